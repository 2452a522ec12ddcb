/* Encoders of trellis_linear and dequantize. */
#include <stdio.h>

#include "mps/mps.h"

/* The smallest compiled row count that holds `rows`: 1, 2, 4 or 8. */
static int row_variant(int64_t rows) {
    int variant = 1;
    while (variant < rows) variant *= 2;
    return variant;
}

const char *mm_mps_linear(const struct mm_mps_linear *linear) {
    struct mm_dispatch dispatch = {0};
    const char *message = NULL;
    bool decode = linear->rows <= MM_DECODE_ROWS;
    int64_t columns = MM_PAD(linear->out_features) / MM_HADAMARD;
    char prefix[256];
    if (!linear->rows) return NULL;
    snprintf(prefix, sizeof prefix,
             "#define MM_T %s\n#define MM_ROWS %d\n#define MM_HAS_BIAS %s\n#define MM_CASES(X) X(%d, %d)\n",
             mm_metal_type(linear->dtype), decode ? row_variant(linear->rows) : 1, linear->bias ? "true" : "false",
             linear->codebook, linear->rate2);
    dispatch.kernel = mm_mps_kernel(MM_METAL_linear, prefix, decode ? "linear_decode" : "linear_prefill", &message);
    if (!dispatch.kernel) return message;
    mm_bind_tensor(&dispatch, LINEAR_X, linear->x);
    mm_bind_tensor(&dispatch, LINEAR_TRELLIS, linear->trellis);
    mm_bind_tensor(&dispatch, LINEAR_SUH, linear->suh);
    mm_bind_tensor(&dispatch, LINEAR_SVH, linear->svh);
    mm_bind_tensor(&dispatch, LINEAR_BIAS, linear->bias ? linear->bias : linear->svh);
    mm_bind_tensor(&dispatch, LINEAR_Y, linear->y);
    mm_bind_int(&dispatch, LINEAR_ROWS, linear->rows);
    mm_bind_int(&dispatch, LINEAR_IN, linear->in_features);
    mm_bind_int(&dispatch, LINEAR_OUT, linear->out_features);
    if (decode)
        mm_grid(&dispatch, columns, 1, MM_DECODE_THREADS);
    else
        mm_grid(&dispatch, columns, (linear->rows + MM_PREFILL_ROWS - 1) / MM_PREFILL_ROWS, MM_PREFILL_THREADS);
    return mm_mps_run(&dispatch, 1);
}

static const char *dequantize_kernels(const struct mm_mps_dequantize *run, struct mm_dispatch *dispatches,
                                      const char *const *names, int count) {
    char prefix[128];
    const char *message = NULL;
    snprintf(prefix, sizeof prefix, "#define MM_T float\n#define MM_CASES(X) X(%d, %d)\n", run->codebook, run->rate2);
    for (int i = 0; i < count; i++) {
        dispatches[i].kernel = mm_mps_kernel(MM_METAL_dequantize, prefix, names[i], &message);
        if (!dispatches[i].kernel) return message;
    }
    return NULL;
}

static void bind_out(const struct mm_mps_dequantize *run, struct mm_dispatch *dispatch) {
    mm_bind_tensor(dispatch, DEQUANTIZE_OUT, run->out);
    mm_bind_int(dispatch, DEQUANTIZE_IN, run->in_features);
    mm_bind_int(dispatch, DEQUANTIZE_COLUMNS, run->out_features);
    mm_bind_int(dispatch, DEQUANTIZE_N, run->n);
}

const char *mm_mps_dequantize(const struct mm_mps_dequantize *run) {
    struct mm_dispatch dispatches[2] = {0};
    bool rotated = !run->suh;
    static const char *const names[] = {"dequantize_columns", "dequantize_rows"}, *const rotated_name = "dequantize_rotated";
    const char *message = dequantize_kernels(run, dispatches, rotated ? &rotated_name : names, rotated ? 1 : 2);
    if (message) return message;
    mm_bind_tensor(&dispatches[0], DEQUANTIZE_TRELLIS, run->trellis);
    mm_grid(&dispatches[0], run->n / MM_HADAMARD, run->k / MM_TILE, MM_DEQUANTIZE_THREADS);
    if (rotated) {
        bind_out(run, &dispatches[0]);
        return mm_mps_run(dispatches, 1);
    }
    mm_tensor_handle scratch =
        mm_mps_scratch(run->k * run->n, mm_torch.aoti_torch_dtype_float32(), run->device.type, run->device.index);
    if (!scratch) return "out of memory for scratch buffers";
    mm_bind_tensor(&dispatches[0], DEQUANTIZE_SVH, run->svh);
    mm_bind_tensor(&dispatches[0], DEQUANTIZE_SCRATCH, scratch);
    mm_bind_int(&dispatches[0], DEQUANTIZE_N, run->n);
    mm_bind_tensor(&dispatches[1], DEQUANTIZE_SCRATCH, scratch);
    mm_bind_tensor(&dispatches[1], DEQUANTIZE_SUH, run->suh);
    bind_out(run, &dispatches[1]);
    mm_grid(&dispatches[1], run->n / MM_TILE, run->k / MM_HADAMARD, MM_DEQUANTIZE_THREADS);
    message = mm_mps_run(dispatches, 2);
    mm_torch.aoti_torch_delete_tensor_object(scratch);
    return message;
}
