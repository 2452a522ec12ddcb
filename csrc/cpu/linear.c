/* One packed matrix: the drivers of trellis_linear, its gradient, and dequantize.
 * Owns how the work is cut into items and where rows live meanwhile; the arithmetic is in the level's kernels. */
#include <string.h>

#include "cpu/cpu.h"

/* Rows in flight: bounds the scratch (8 bytes x k a row) without decoding a tile more often. */
#define CHUNK_ROWS (8 * MM_ROW_BLOCK)

struct linear {
    const struct mm_rows *in;
    const struct mm_weight *weight;
    int64_t first_row, rows; /* of this chunk */
    int64_t in_width, in_used, out_width, out_used;
    int64_t ld; /* floats of a rotated row */
    int64_t threads;
    float *rotated; /* [rows, ld] */
    char *out;
    bool transposed;
};

/* As many rows from `first` on as one product takes. */
static int64_t rows_together(const struct linear *run, int64_t first) {
    return run->rows - first < MM_ROW_BLOCK ? run->rows - first : MM_ROW_BLOCK;
}

static void rotate_row(int64_t item, void *scratch, void *context) {
    const struct linear *run = context;
    float *row = scratch, *rotated = run->rotated + item * run->ld;
    mm_cpu->load(row, mm_rows_at(run->in, run->first_row + item), run->in->type, run->in->column_stride, run->in_used);
    memset(row + run->in_used, 0, (size_t)(run->in_width - run->in_used) * sizeof *row);
    if (run->transposed)
        mm_cpu->rotate_grad(rotated, row, run->weight->svh, run->in_width, run->in_used);
    else
        mm_cpu->rotate_in(rotated, row, run->weight->suh, run->in_width, run->in_used, run->weight->codebook,
                          rows_together(run, item / MM_ROW_BLOCK * MM_ROW_BLOCK));
}

static void multiply_block(int64_t item, void *scratch, void *context) {
    const struct linear *run = context;
    struct mm_weight weight = *run->weight;
    int64_t blocks = run->out_width / MM_HADAMARD, block = item % blocks, row = item / blocks * MM_ROW_BLOCK;
    int64_t rows = rows_together(run, row), column = block * MM_HADAMARD;
    float *y = scratch;
    const float *rotated = run->rotated + row * run->ld;
    if (run->transposed) {
        mm_cpu->multiply_transposed(y, &weight, block, rotated, rows, y + rows * MM_HADAMARD);
        mm_cpu->rotate_out(y, rows, weight.suh + column, NULL);
    } else {
        weight.next = mm_weight_block(&weight, (item + run->threads) % blocks);
        mm_cpu->multiply(y, &weight, block, rotated, run->ld, rows, y + rows * MM_HADAMARD);
        mm_cpu->rotate_out(y, rows, weight.svh + column, weight.bias ? weight.bias + column : NULL);
    }
    int64_t kept = run->out_used - column < MM_HADAMARD ? run->out_used - column : MM_HADAMARD;
    char *out = run->out + ((run->first_row + row) * run->out_used + column) * (int64_t)mm_float_bytes(run->in->type);
    for (int64_t r = 0; r < rows; r++, out += run->out_used * (int64_t)mm_float_bytes(run->in->type))
        mm_cpu->store(out, y + r * MM_HADAMARD, run->in->type, kept);
}

static bool run_linear(struct linear *run) {
    int64_t rows = run->in->rows, blocks = run->out_width / MM_HADAMARD;
    int64_t chunk = rows < CHUNK_ROWS ? rows : CHUNK_ROWS;
    if (!rows) return true;
    run->threads = mm_threads.count();
    run->rotated = mm_alloc((size_t)(chunk * run->ld) * sizeof(float));
    bool done = run->rotated != NULL;
    int64_t block_rows = chunk < MM_ROW_BLOCK ? chunk : MM_ROW_BLOCK;
    size_t scratch_bytes = (size_t)(block_rows * MM_HADAMARD + MM_MULTIPLY_SCRATCH) * sizeof(float);
    for (run->first_row = 0; done && run->first_row < rows; run->first_row += chunk) {
        run->rows = rows - run->first_row < chunk ? rows - run->first_row : chunk;
        int64_t row_blocks = (run->rows + MM_ROW_BLOCK - 1) / MM_ROW_BLOCK;
        done = MM_PARALLEL(run, {run->rows, (size_t)run->in_width * sizeof(float), rotate_row},
                           {row_blocks * blocks, scratch_bytes, multiply_block});
    }
    mm_free(run->rotated);
    return done;
}

bool mm_cpu_linear(const struct mm_rows *x, const struct mm_weight *weight, int64_t out_features, void *y) {
    struct linear run = {
        .in = x, .weight = weight, .in_width = weight->k, .in_used = x->columns, .out_width = weight->n,
        .out_used = out_features, .ld = mm_row_stride(weight->k / MM_HADAMARD * mm_cpu->row_floats(weight->codebook)), .out = y, .transposed = false,
    };
    return run_linear(&run);
}

bool mm_cpu_linear_backward(const struct mm_rows *grad, const struct mm_weight *weight, int64_t in_features, void *dx) {
    struct linear run = {
        .in = grad, .weight = weight, .in_width = weight->n, .in_used = grad->columns, .out_width = weight->k,
        .out_used = in_features, .ld = 4 * weight->n, .out = dx, .transposed = true,
    };
    return run_linear(&run);
}

struct dequantize {
    const struct mm_weight *weight;
    bool rotated;
    int64_t in_features, out_features;
    float *out;
};

static void dequantize_block(int64_t item, void *scratch, void *context) {
    const struct dequantize *run = context;
    int64_t blocks = run->weight->n / MM_HADAMARD, k_block = item / blocks, n_block = item % blocks;
    int64_t first_row = k_block * MM_HADAMARD, column = n_block * MM_HADAMARD;
    float *values = scratch;
    mm_cpu->dequantize(values, run->weight, k_block, n_block, run->rotated);
    int64_t columns = run->out_features - column < MM_HADAMARD ? run->out_features - column : MM_HADAMARD;
    for (int64_t row = 0; row < MM_HADAMARD && first_row + row < run->in_features; row++)
        memcpy(run->out + (first_row + row) * run->out_features + column, values + row * MM_HADAMARD,
               (size_t)columns * sizeof *values);
}

bool mm_cpu_dequantize(const struct mm_weight *weight, bool rotated, int64_t in_features, int64_t out_features,
                       float *out) {
    struct dequantize run = {weight, rotated, in_features, out_features, out};
    return MM_PARALLEL(&run, {weight->k / MM_HADAMARD * (weight->n / MM_HADAMARD),
                              MM_HADAMARD * MM_HADAMARD * sizeof(float), dequantize_block});
}
