/* The ops as PyTorch sees them: schemas, unboxing, argument checks, outputs, errors.
 * Owns every check of what a caller may get wrong; leaves the work to a backend (cpu/). Nothing below this file knows
 * torch, nothing above it sees an unchecked argument. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "cpu/cpu.h"
#include "memory/memory.h"
#include "mm.h"
#include "mps/mps.h"
#include "mps/window.h"
#include "quantize/search.h"

/* X(name, arguments, results) */
#define STACK(p) "Tensor " p "_trellis, Tensor " p "_table, Tensor " p "_suh, Tensor " p "_svh, Tensor " p "_bias, "
#define MOE_ARGUMENTS                                                                                \
    "Tensor x, Tensor weights, Tensor ids, " STACK("gate") STACK("up") STACK("down")                 \
    "int intermediate, str activation, float alpha, float limit, int formats=-1"
#define MM_OPS(X)                                                                                              \
    X(trellis_linear,                                                                                          \
      "Tensor x, Tensor trellis, Tensor suh, Tensor svh, Tensor bias, str codebook, int out_features",         \
      "Tensor")                                                                                                \
    X(trellis_linear_backward,                                                                                 \
      "Tensor grad, Tensor trellis, Tensor suh, Tensor svh, str codebook, int in_features", "Tensor")          \
    X(moe_trellis_swiglu, MOE_ARGUMENTS, "Tensor")                                                             \
    X(moe_trellis_swiglu_backward, "Tensor grad, " MOE_ARGUMENTS, "(Tensor, Tensor)")                          \
    X(router,                                                                                                  \
      "Tensor x, Tensor gate, Tensor correction, int top_k, str kind, bool renormalize, float scale, "         \
      "int n_group, int topk_group",                                                                           \
      "(Tensor, Tensor, Tensor)")                                                                              \
    X(dequantize, "Tensor trellis, Tensor suh, Tensor svh, str codebook, int in_features, int out_features",   \
      "Tensor")                                                                                                \
    X(trellis_quantize, "Tensor tiles, int rate2, str codebook", "(Tensor, Tensor)")                            \
    X(mapped_window, "Tensor like, int window", "Tensor")                                                       \
    X(dispatch_kernel,                                                                                         \
      "str source, str name, Tensor(a!)[] tensors, int[] layout, int[] scalars, int[] grid, int[] group", "()")

/* ---- messages ---- */

static bool fail(struct mm_call *call, const char *format, ...) __attribute__((format(printf, 2, 3)));
static bool fail(struct mm_call *call, const char *format, ...) {
    const char *end = strchr(call->op->schema, '(');
    int length = snprintf(call->message, sizeof call->message, "metal_marlin::%.*s: ", (int)(end - call->op->schema),
                          call->op->schema);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(call->message + length, sizeof call->message - (size_t)length, format, arguments);
    va_end(arguments);
    return false;
}

static bool fail_memory(struct mm_call *call) { return fail(call, "out of memory for scratch buffers"); }

struct text {
    char text[160];
};

static struct text dtype_name(int32_t dtype) {
    struct text out = {""};
#define DTYPE(name) \
    if (dtype == mm_torch.aoti_torch_dtype_##name()) return (struct text){#name};
    DTYPE(float64) DTYPE(float32) DTYPE(float16) DTYPE(bfloat16) DTYPE(int64) DTYPE(int32) DTYPE(int16) DTYPE(int8)
    DTYPE(uint8) DTYPE(bool)
#undef DTYPE
    snprintf(out.text, sizeof out.text, "number %d of PyTorch's list", (int)dtype); /* complex, float8 and the like */
    return out;
}

static struct text shape_text(const struct mm_tensor *tensor) {
    struct text out = {"["};
    size_t length = 1;
    for (int64_t d = 0; d < tensor->dim && length < sizeof out.text - 26; d++)
        length += (size_t)snprintf(out.text + length, sizeof out.text - length, "%s%lld", d ? ", " : "",
                                   (long long)tensor->sizes[d]);
    snprintf(out.text + length, sizeof out.text - length, "]");
    return out;
}

/* ---- unboxing ---- */

/* Whether the call's tensors belong to the MPS backend (in tests, an emulator makes that the CPU's). */
static bool on_mps(const struct mm_call *call) { return call->device_type == mm_mps_device_type(); }

static bool unbox_tensor(struct mm_call *call, struct mm_tensor *tensor) {
    int64_t *sizes = NULL, *strides = NULL;
    if (mm_torch.aoti_torch_get_dim(tensor->handle, &tensor->dim) ||
        mm_torch.aoti_torch_get_sizes(tensor->handle, &sizes) ||
        mm_torch.aoti_torch_get_strides(tensor->handle, &strides) ||
        mm_torch.aoti_torch_get_dtype(tensor->handle, &tensor->dtype) ||
        mm_torch.aoti_torch_get_device_type(tensor->handle, &tensor->device_type) ||
        mm_torch.aoti_torch_get_device_index(tensor->handle, &tensor->device_index) ||
        mm_torch.aoti_torch_get_data_ptr(tensor->handle, &tensor->data))
        return fail(call, "%s is not a tensor with strided memory", tensor->name);
    tensor->sizes = sizes;
    tensor->strides = strides;
    tensor->numel = 1;
    for (int64_t d = 0; d < tensor->dim; d++) tensor->numel *= sizes[d];
    if (!call->has_tensor) call->device_type = tensor->device_type;
    call->has_tensor = true;
    if (!on_mps(call) && call->device_type != mm_torch.aoti_torch_device_type_cpu())
        return fail(call, "%s is on device type %d; expected the CPU%s", tensor->name, (int)call->device_type,
                    mm_mps_device_type() < 0 ? " (the MPS backend is off: python -m metal_marlin info says why)" : " or MPS");
    if (tensor->device_type != call->device_type)
        return fail(call, "%s is on device type %d, an earlier argument on %d; expected all tensors on one device",
                    tensor->name, (int)tensor->device_type, (int)call->device_type);
    return true;
}


static bool unbox_string(struct mm_call *call, struct mm_argument *argument, const char *name) {
    size_t length = 0;
    if (mm_torch.torch_string_c_str(argument->string_handle, &argument->string) ||
        mm_torch.torch_string_length(argument->string_handle, &length))
        return fail(call, "%s could not be read", name);
    if (strlen(argument->string) != length)
        return fail(call, "%s is '%.40s' and %zu characters more after a NUL; expected plain text", name,
                    argument->string, length - strlen(argument->string));
    return true;
}

static bool unbox_argument(struct mm_call *call, int index, mm_stable_ivalue value) {
    struct mm_argument *argument = &call->arguments[index];
    switch (argument->type) {
    case 'T':
        return unbox_tensor(call, &argument->tensor);
    case 'i':
        memcpy(&argument->integer, &value, sizeof argument->integer);
        return true;
    case 'f':
        memcpy(&argument->number, &value, sizeof argument->number);
        return true;
    case 'b':
        argument->truth = (value & 0xFFu) != 0;
        return true;
    case 'l':
        return true;
    default:
        return unbox_string(call, argument, call->op->names[index]);
    }
}

/* After the work: whether the mapped files that it read are as they were when it began. Here, since compiled models ask nowhere else. */
static bool files_same(struct mm_call *call) {
    struct mm_span spans[MM_MAX_ARGUMENTS];
    struct mm_memory_problem problem;
    int count = 0;
    if (on_mps(call)) return true; /* what was encoded runs later */
    for (int i = 0; i < call->op->arguments; i++)
        if (call->op->types[i] == 'T') /* stacks of int16 alone lie in several files: 2 bytes an element */
            spans[count++] = (struct mm_span){call->arguments[i].tensor.data, 2 * (size_t)call->arguments[i].tensor.numel};
    return mm_maps_same(spans, count, &problem) || fail(call, "%s", problem.text);
}

/* Takes ownership of everything on the stack first, so that an error anywhere frees it all. */
static void run_boxed(const struct mm_op *op, mm_stable_ivalue *stack, uint64_t n_in, uint64_t n_out) {
    struct mm_call call = {.op = op};
    bool done = n_in == (uint64_t)op->arguments && n_out == (uint64_t)op->outputs;
    for (int i = 0; i < op->arguments && done; i++) {
        struct mm_argument *argument = &call.arguments[i];
        argument->type = op->types[i];
        if (argument->type == 'T') {
            memcpy(&argument->tensor.handle, &stack[i], sizeof argument->tensor.handle);
            argument->tensor.name = op->names[i];
        }
        if (argument->type == 's') memcpy(&argument->string_handle, &stack[i], sizeof argument->string_handle);
        if (argument->type == 'l') memcpy(&argument->list_handle, &stack[i], sizeof argument->list_handle);
    }
    if (!done) fail(&call, "called with %d arguments; expected %d", (int)n_in, op->arguments);
    for (int i = 0; i < op->arguments && done; i++) done = unbox_argument(&call, i, stack[i]);
    if (done) mm_maps_watch();
    done = done && op->run(&call) && files_same(&call);
    for (int i = 0; i < op->arguments; i++) {
        if (call.arguments[i].tensor.handle) mm_torch.aoti_torch_delete_tensor_object(call.arguments[i].tensor.handle);
        if (call.arguments[i].string_handle) mm_torch.torch_delete_string(call.arguments[i].string_handle);
        if (call.arguments[i].list_handle) mm_torch.torch_delete_list(call.arguments[i].list_handle);
    }
    if (done) {
        for (int i = 0; i < op->outputs; i++) {
            stack[i] = 0;
            memcpy(&stack[i], &call.outputs[i], sizeof call.outputs[i]);
        }
        return;
    }
    for (int i = 0; i < MM_MAX_OUTPUTS; i++)
        if (call.outputs[i]) mm_torch.aoti_torch_delete_tensor_object(call.outputs[i]);
    /* The one place that throws: a C++ exception through these C frames (built with unwind tables). */
    mm_torch.aoti_torch_check(false, __func__, __FILE__, (uint32_t)__LINE__, call.message);
}

static void *new_output(struct mm_call *call, int index, int64_t dim, const int64_t *sizes, int32_t dtype) {
    int64_t strides[64], stride = 1;
    void *data = NULL;
    for (int64_t d = dim - 1; d >= 0; d--) {
        strides[d] = stride;
        stride *= sizes[d] > 0 ? sizes[d] : 1;
    }
    if (mm_torch.aoti_torch_empty_strided(dim, sizes, strides, dtype, call->device_type, call->arguments[0].tensor.device_index,
                                          &call->outputs[index]) ||
        mm_torch.aoti_torch_get_data_ptr(call->outputs[index], &data)) {
        fail(call, "out of memory for the result");
        return NULL;
    }
    static char nothing; /* an empty tensor may have no memory; NULL means failure here */
    return data ? data : &nothing;
}

/* ---- checks ---- */

static const struct mm_tensor *tensor_at(struct mm_call *call, int index) { return &call->arguments[index].tensor; }

static bool is_contiguous(const struct mm_tensor *tensor) {
    int64_t stride = 1;
    for (int64_t d = tensor->dim - 1; d >= 0; d--) {
        if (tensor->sizes[d] != 1 && tensor->strides[d] != stride) return false;
        stride *= tensor->sizes[d];
    }
    return true;
}

static bool float_type(int32_t dtype, enum mm_float *type) {
    if (dtype == mm_torch.aoti_torch_dtype_float32()) return *type = MM_FLOAT32, true;
    if (dtype == mm_torch.aoti_torch_dtype_float16()) return *type = MM_FLOAT16, true;
    if (dtype == mm_torch.aoti_torch_dtype_bfloat16()) return *type = MM_BFLOAT16, true;
    return false;
}

/* Replaces an argument by a contiguous copy: the Metal kernels take no strides. */
static bool make_contiguous(struct mm_call *call, int index) {
    struct mm_tensor *tensor = &call->arguments[index].tensor;
    if (is_contiguous(tensor)) return true;
    int32_t format = mm_torch.aoti_torch_memory_format_contiguous_format();
    mm_stable_ivalue stack[2] = {0, 0};
    memcpy(&stack[0], &tensor->handle, sizeof tensor->handle); /* the dispatcher takes ownership */
    memcpy(&stack[1], &format, sizeof format);
    tensor->handle = NULL;
    if (mm_torch.torch_call_dispatcher("aten::contiguous", "", stack, MM_TORCH_ABI_VERSION))
        return fail(call, "%s could not be made contiguous", tensor->name);
    memcpy(&tensor->handle, &stack[0], sizeof tensor->handle);
    return unbox_tensor(call, tensor);
}

/* A driver's answer: NULL, or what failed. */
static bool mps_done(struct mm_call *call, const char *message) { return !message || fail(call, "%s", message); }

/* A tensor of any shape and stride as rows of its last dimension. */
static bool rows_of(struct mm_call *call, const struct mm_tensor *tensor, struct mm_rows *rows) {
    if (tensor->dim < 1 || tensor->dim > 64)
        return fail(call, "%s has %lld dimensions; expected 1 to 64", tensor->name, (long long)tensor->dim);
    if (!float_type(tensor->dtype, &rows->type))
        return fail(call, "%s has dtype %s; expected float32, bfloat16 or float16", tensor->name,
                    dtype_name(tensor->dtype).text);
    rows->data = tensor->data;
    rows->columns = tensor->sizes[tensor->dim - 1];
    rows->column_stride = tensor->strides[tensor->dim - 1];
    rows->lead_dims = (int)tensor->dim - 1;
    rows->sizes = tensor->sizes;
    rows->strides = tensor->strides;
    rows->rows = 1;
    for (int d = 0; d < rows->lead_dims; d++) rows->rows *= tensor->sizes[d];
    if (rows->columns < 1)
        return fail(call, "%s has shape %s; its last dimension must not be empty", tensor->name,
                    shape_text(tensor).text);
    return true;
}

static bool same_lead(struct mm_call *call, const struct mm_tensor *tensor, const struct mm_tensor *x) {
    bool same = tensor->dim == x->dim;
    for (int64_t d = 0; same && d + 1 < x->dim; d++) same = tensor->sizes[d] == x->sizes[d];
    if (same) return true;
    struct text shape = shape_text(tensor);
    return fail(call, "%s has shape %s; expected the leading dimensions of %s, which has shape %s", tensor->name,
                shape.text, x->name, shape_text(x).text);
}

static bool packed(struct mm_call *call, const struct mm_tensor *tensor, int32_t dtype, int64_t dim) {
    if (tensor->dtype != dtype)
        return fail(call, "%s has dtype %s; expected %s", tensor->name, dtype_name(tensor->dtype).text, dtype_name(dtype).text);
    if (tensor->dim != dim)
        return fail(call, "%s has shape %s; expected %lld dimensions", tensor->name, shape_text(tensor).text,
                    (long long)dim);
    if (!is_contiguous(tensor))
        return fail(call, "%s with shape %s is not contiguous; packed weights must be", tensor->name,
                    shape_text(tensor).text);
    return true;
}

static bool find_name(struct mm_call *call, int index, const char *const *names, int count, int *found) {
    const char *value = call->arguments[index].string;
    char list[160] = "";
    size_t length = 0;
    for (int i = 0; i < count; i++) {
        if (!strcmp(value, names[i])) return *found = i, true;
        length += (size_t)snprintf(list + length, sizeof list - length, "%s%s", i ? ", " : "", names[i]);
    }
    return fail(call, "%s is '%.40s'; expected one of %s", call->op->names[index], value, list);
}

#define X(id, name, ...) name,
static const char *const codebook_names[] = {MM_CODEBOOKS(X)};
static const char *const activation_names[] = {MM_ACTIVATIONS(X)};
static const char *const router_names[] = {MM_ROUTERS(X)};
#undef X
#define X(id, name, multiplier, addend, half_rates) half_rates,
static const bool codebook_half_rates[] = {MM_CODEBOOKS(X)};
#undef X

static bool rate_exists(int codebook, int64_t rate2) {
    if (rate2 < MM_MIN_RATE2 || rate2 > MM_MAX_RATE2) return false;
    return rate2 % 2 == 0 || (codebook_half_rates[codebook] && rate2 <= MM_MAX_HALF_RATE2);
}

static bool vector_of(struct mm_call *call, const struct mm_tensor *tensor, int64_t lead, int64_t count,
                      const uint16_t **out) {
    int64_t dim = lead ? 2 : 1;
    if (!packed(call, tensor, mm_torch.aoti_torch_dtype_float16(), dim)) return false;
    if (tensor->sizes[dim - 1] != count || (lead && tensor->sizes[0] != lead)) {
        if (lead)
            return fail(call, "%s has shape %s; the packed weight needs [%lld, %lld]", tensor->name,
                        shape_text(tensor).text, (long long)lead, (long long)count);
        return fail(call, "%s has shape %s; the packed weight needs [%lld]", tensor->name, shape_text(tensor).text,
                    (long long)count);
    }
    *out = tensor->data;
    return true;
}

/* trellis [k/16, n/16, 16 K], with the codebook's name at `codebook` */
static bool trellis_of(struct mm_call *call, int trellis, int codebook, struct mm_weight *weight) {
    const struct mm_tensor *tensor = tensor_at(call, trellis);
    if (!find_name(call, codebook, codebook_names, MM_CODEBOOK_COUNT, &weight->codebook)) return false;
    if (!packed(call, tensor, mm_torch.aoti_torch_dtype_int16(), 3)) return false;
    int64_t width = tensor->sizes[2];
    if (width % 8 || !rate_exists(weight->codebook, width / 8))
        return fail(call,
                    "trellis has shape %s: its last dimension must be 16 x bits with bits 1 to 8%s for codebook %s; "
                    "%lld / 16 is not",
                    shape_text(tensor).text,
                    codebook_half_rates[weight->codebook] ? ", or 1.5, 2.5 or 3.5" : " in whole bits",
                    codebook_names[weight->codebook], (long long)width);
    weight->k = tensor->sizes[0] * MM_TILE;
    weight->n = tensor->sizes[1] * MM_TILE;
    if (!weight->k || !weight->n || weight->k % MM_HADAMARD || weight->n % MM_HADAMARD)
        return fail(call, "trellis has shape %s, a %lld x %lld weight; both must be multiples of 128, not 0",
                    shape_text(tensor).text, (long long)weight->k, (long long)weight->n);
    weight->rate2 = (int)(width / 8);
    weight->tiles = tensor->data;
    return true;
}

/* The true width of a side whose packed width is `padded`. */
static bool width_fits(struct mm_call *call, const char *what, int64_t width, int64_t padded) {
    if (width >= 1 && width <= padded && MM_PAD(width) == padded) return true;
    return fail(call, "%s %lld; the packed weight was made for %lld to %lld", what, (long long)width,
                (long long)(padded - MM_HADAMARD + 1), (long long)padded);
}

static bool bias_of(struct mm_call *call, const struct mm_tensor *tensor, int64_t lead, int64_t count,
                    const uint16_t **out) {
    *out = NULL;
    return tensor->numel == 0 || vector_of(call, tensor, lead, count, out);
}

/* ---- trellis_linear ---- */

static bool linear_weight(struct mm_call *call, int trellis, int codebook, struct mm_weight *weight) {
    return trellis_of(call, trellis, codebook, weight) &&
           vector_of(call, tensor_at(call, trellis + 1), 0, weight->k, &weight->suh) &&
           vector_of(call, tensor_at(call, trellis + 2), 0, weight->n, &weight->svh);
}

static void *rows_output(struct mm_call *call, int index, const struct mm_tensor *like, int64_t columns) {
    int64_t sizes[64];
    for (int64_t d = 0; d + 1 < like->dim; d++) sizes[d] = like->sizes[d];
    sizes[like->dim - 1] = columns;
    return new_output(call, index, like->dim, sizes, like->dtype);
}

static bool run_trellis_linear(struct mm_call *call) {
    enum { X, TRELLIS, SUH, SVH, BIAS, CODEBOOK, OUT_FEATURES };
    struct mm_rows x;
    struct mm_weight weight = {0};
    int64_t out_features = call->arguments[OUT_FEATURES].integer;
    if (!rows_of(call, tensor_at(call, X), &x) || !linear_weight(call, TRELLIS, CODEBOOK, &weight) ||
        !bias_of(call, tensor_at(call, BIAS), 0, weight.n, &weight.bias) ||
        !width_fits(call, "x's last dimension is", x.columns, weight.k) ||
        !width_fits(call, "out_features is", out_features, weight.n))
        return false;
    void *y = rows_output(call, 0, tensor_at(call, X), out_features);
    if (!y || !on_mps(call)) return y && (mm_cpu_linear(&x, &weight, out_features, y) || fail_memory(call));
    if (!make_contiguous(call, X)) return false;
    struct mm_mps_linear linear = {
        .x = tensor_at(call, X)->handle,
        .trellis = tensor_at(call, TRELLIS)->handle,
        .suh = tensor_at(call, SUH)->handle,
        .svh = tensor_at(call, SVH)->handle,
        .bias = tensor_at(call, BIAS)->numel ? tensor_at(call, BIAS)->handle : NULL,
        .y = call->outputs[0],
        .dtype = tensor_at(call, X)->dtype,
        .rows = x.rows,
        .in_features = x.columns,
        .out_features = out_features,
        .rate2 = weight.rate2,
        .codebook = weight.codebook,
    };
    return mps_done(call, mm_mps_linear(&linear));
}

static bool run_trellis_linear_backward(struct mm_call *call) {
    enum { GRAD, TRELLIS, SUH, SVH, CODEBOOK, IN_FEATURES };
    struct mm_rows grad;
    struct mm_weight weight = {0};
    int64_t in_features = call->arguments[IN_FEATURES].integer;
    if (!rows_of(call, tensor_at(call, GRAD), &grad) || !linear_weight(call, TRELLIS, CODEBOOK, &weight) ||
        !width_fits(call, "grad's last dimension is", grad.columns, weight.n) ||
        !width_fits(call, "in_features is", in_features, weight.k))
        return false;
    void *dx = rows_output(call, 0, tensor_at(call, GRAD), in_features);
    return dx && (mm_cpu_linear_backward(&grad, &weight, in_features, dx) || fail_memory(call));
}

static bool run_dequantize(struct mm_call *call) {
    enum { TRELLIS, SUH, SVH, CODEBOOK, IN_FEATURES, OUT_FEATURES };
    struct mm_weight weight = {0};
    int64_t sizes[2] = {call->arguments[IN_FEATURES].integer, call->arguments[OUT_FEATURES].integer};
    bool rotated = tensor_at(call, SUH)->numel == 0 && tensor_at(call, SVH)->numel == 0;
    if (!(rotated ? trellis_of(call, TRELLIS, CODEBOOK, &weight) : linear_weight(call, TRELLIS, CODEBOOK, &weight)) ||
        !width_fits(call, "in_features is", sizes[0], weight.k) ||
        !width_fits(call, "out_features is", sizes[1], weight.n))
        return false;
    float *out = new_output(call, 0, 2, sizes, mm_torch.aoti_torch_dtype_float32());
    if (!out || !on_mps(call))
        return out && (mm_cpu_dequantize(&weight, rotated, sizes[0], sizes[1], out) || fail_memory(call));
    struct mm_mps_dequantize run = {
        .trellis = tensor_at(call, TRELLIS)->handle,
        .suh = rotated ? NULL : tensor_at(call, SUH)->handle,
        .svh = rotated ? NULL : tensor_at(call, SVH)->handle,
        .out = call->outputs[0],
        .device = {call->device_type, tensor_at(call, TRELLIS)->device_index},
        .k = weight.k,
        .n = weight.n,
        .in_features = sizes[0],
        .out_features = sizes[1],
        .rate2 = weight.rate2,
        .codebook = weight.codebook,
    };
    return mps_done(call, mm_mps_dequantize(&run));
}

/* ---- moe_trellis_swiglu ---- */

/* Bits of all (codebook, rate) pairs of the format: 16 * codebook + rate2 - 1. */
static int64_t all_formats(void) {
    int64_t formats = 0;
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
            if (rate_exists(codebook, rate2)) formats |= (int64_t)1 << (16 * codebook + rate2 - 1);
    return formats;
}

/* A table's rows. Only where the CPU can read them: on a GPU they are what the module made. */
static bool table_of(struct mm_call *call, const struct mm_tensor *trellis, const struct mm_tensor *table,
                     int64_t formats, const struct mm_stack *stack) {
    for (int64_t e = 0; e < table->sizes[0]; e++) {
        const int64_t *row = stack->table + 3 * e;
        if (row[2] < 0 || row[2] >= MM_CODEBOOK_COUNT)
            return fail(call, "%s has codebook %lld for expert %lld; expected 0 to %d", table->name, (long long)row[2],
                        (long long)e, MM_CODEBOOK_COUNT - 1);
        if (!rate_exists((int)row[2], row[1]))
            return fail(call, "%s has 2 x bits = %lld for expert %lld, a rate that codebook %s does not have",
                        table->name, (long long)row[1], (long long)e, codebook_names[row[2]]);
        if (!mm_format_in(formats, (int)row[2], (int)row[1]))
            return fail(call, "%s has codebook %s at 2 x bits = %lld for expert %lld, which formats (%lld) leaves out",
                        table->name, codebook_names[row[2]], (long long)row[1], (long long)e, (long long)formats);
        if (on_mps(call) && row[0] % MM_TILE_ALIGNMENT) /* the CPU's kernels take tiles where a file has them */
            return fail(call, "%s has offset %lld for expert %lld; expected a multiple of %d, as tiles are stored",
                        table->name, (long long)row[0], (long long)e, MM_TILE_ALIGNMENT);
        int64_t count = stack->k / MM_TILE * (stack->n / MM_TILE) * MM_TILE_INT16(row[1]);
        if (row[0] < 0 || row[0] > trellis->numel || count > trellis->numel - row[0])
            return fail(call, "%s puts expert %lld's %lld elements at offset %lld; %s holds %lld", table->name,
                        (long long)e, (long long)count, (long long)row[0], trellis->name, (long long)trellis->numel);
    }
    return true;
}

static bool stack_of(struct mm_call *call, int first, int64_t experts, int64_t in_features, int64_t out_features,
                     int64_t formats, struct mm_stack *stack) {
    const struct mm_tensor *trellis = tensor_at(call, first), *table = tensor_at(call, first + 1);
    if (!packed(call, trellis, mm_torch.aoti_torch_dtype_int16(), 1) ||
        !packed(call, table, mm_torch.aoti_torch_dtype_int64(), 2))
        return false;
    if (table->sizes[0] != experts || table->sizes[1] != 3)
        return fail(call, "%s has shape %s; expected [%lld, 3]: offset, 2 x bits, codebook of each expert",
                    table->name, shape_text(table).text, (long long)experts);
    stack->k = MM_PAD(in_features);
    stack->n = MM_PAD(out_features);
    stack->tiles = trellis->data;
    stack->table = table->data;
    bool readable = call->device_type == mm_torch.aoti_torch_device_type_cpu();
    if (readable && !table_of(call, trellis, table, formats, stack)) return false;
    return vector_of(call, tensor_at(call, first + 2), experts, stack->k, &stack->suh) &&
           vector_of(call, tensor_at(call, first + 3), experts, stack->n, &stack->svh) &&
           bias_of(call, tensor_at(call, first + 4), experts, stack->n, &stack->bias);
}

/* Whether the widths that the caller gave are those that a stack's scales were made for: before anything else is derived from
 * them, so that the message names the width and not the tensor. `x` NULL: the input is the expert's inner width. */
static bool stack_fits(struct mm_call *call, int first, const char *x, int64_t in_features, int64_t out_features) {
    const struct mm_tensor *suh = tensor_at(call, first + 2), *svh = tensor_at(call, first + 3);
    const struct mm_tensor *scales[2] = {suh, svh};
    int64_t widths[2] = {in_features, out_features};
    for (int side = 0; side < 2; side++) {
        int64_t padded = scales[side]->dim == 2 ? scales[side]->sizes[1] : MM_PAD(widths[side]);
        bool hidden = (side == 0) == (x != NULL);
        if (MM_PAD(widths[side]) != padded && padded % MM_HADAMARD == 0 && padded > 0)
            return fail(call, "%s %lld (%lld padded); %s with shape %s was made for %lld to %lld",
                        hidden ? "x's last dimension is" : "intermediate is", (long long)widths[side],
                        (long long)MM_PAD(widths[side]), scales[side]->name, shape_text(scales[side]).text, (long long)(padded - MM_HADAMARD + 1),
                        (long long)padded);
    }
    return true;
}

/* ids, of int32 or int64 and any strides, as a plain int32 array that the caller frees. -1 is a slot without an expert. */
static int32_t *ids_of(struct mm_call *call, const struct mm_tensor *ids, int64_t experts, int64_t top_k) {
    bool wide = ids->dtype == mm_torch.aoti_torch_dtype_int64();
    int32_t *out = mm_alloc((size_t)ids->numel * sizeof *out);
    if (!out) return fail_memory(call), NULL;
    for (int64_t i = 0; i < ids->numel; i++) {
        int64_t offset = 0, rest = i;
        for (int64_t d = ids->dim - 1; d >= 0; d--) {
            offset += rest % ids->sizes[d] * ids->strides[d];
            rest /= ids->sizes[d];
        }
        int64_t id = wide ? ((const int64_t *)ids->data)[offset] : ((const int32_t *)ids->data)[offset];
        if (id < MM_NO_EXPERT || id >= experts) {
            mm_free(out);
            return fail(call, "ids holds %lld at token %lld, slot %lld; expected 0 to %lld, or -1 for none", (long long)id,
                        (long long)(i / top_k), (long long)(i % top_k), (long long)(experts - 1)),
                   NULL;
        }
        out[i] = (int32_t)id;
    }
    return out;
}

/* The arguments that forward and backward share, from argument `first` on. */
static bool moe_of(struct mm_call *call, int first, struct mm_moe *moe, int64_t *formats) {
    enum { X, WEIGHTS, IDS, GATE, UP = GATE + 5, DOWN = UP + 5, INTERMEDIATE = DOWN + 5, ACTIVATION, ALPHA, LIMIT, FORMATS };
    const struct mm_tensor *x = tensor_at(call, first + X), *weights = tensor_at(call, first + WEIGHTS);
    const struct mm_tensor *ids = tensor_at(call, first + IDS), *table = tensor_at(call, first + GATE + 1);
    int activation = 0;
    if (!rows_of(call, x, &moe->x) || !rows_of(call, weights, &moe->weights) || !same_lead(call, weights, x) ||
        !same_lead(call, ids, x) ||
        !find_name(call, first + ACTIVATION, activation_names, MM_ACTIVATION_COUNT, &activation))
        return false;
    moe->activation = (enum mm_activation)activation;
    moe->alpha = (float)call->arguments[first + ALPHA].number;
    moe->limit = (float)call->arguments[first + LIMIT].number;
    moe->intermediate = call->arguments[first + INTERMEDIATE].integer;
    moe->experts = table->dim ? table->sizes[0] : 0;
    int64_t top_k = moe->weights.columns, hidden = moe->x.columns;
    if (ids->dtype != mm_torch.aoti_torch_dtype_int32() && ids->dtype != mm_torch.aoti_torch_dtype_int64())
        return fail(call, "ids has dtype %s; expected int32 or int64", dtype_name(ids->dtype).text);
    if (ids->sizes[ids->dim - 1] != top_k)
        return fail(call, "ids has %lld experts a token; weights has %lld", (long long)ids->sizes[ids->dim - 1],
                    (long long)top_k);
    if (top_k > MM_MAX_TOP_K)
        return fail(call, "weights has %lld experts a token; expected 1 to %d", (long long)top_k, MM_MAX_TOP_K);
    if (moe->experts < 1 || moe->experts > MM_MAX_EXPERTS)
        return fail(call, "gate_table has %lld experts; expected 1 to %d", (long long)moe->experts, MM_MAX_EXPERTS);
    if (moe->intermediate < 1 || moe->intermediate > INT32_MAX)
        return fail(call, "intermediate is %lld; expected 1 or more", (long long)moe->intermediate);
    *formats = call->arguments[first + FORMATS].integer & all_formats(); /* -1, the default, is all of them */
    if (!*formats)
        return fail(call, "formats is %lld; expected -1 or bits 16 x codebook + 2 x bits - 1 of what occurs",
                    (long long)call->arguments[first + FORMATS].integer);
    return stack_fits(call, first + GATE, x->name, hidden, moe->intermediate) &&
           stack_fits(call, first + UP, x->name, hidden, moe->intermediate) &&
           stack_fits(call, first + DOWN, NULL, moe->intermediate, hidden) &&
           stack_of(call, first + GATE, moe->experts, hidden, moe->intermediate, *formats, &moe->gate) &&
           stack_of(call, first + UP, moe->experts, hidden, moe->intermediate, *formats, &moe->up) &&
           stack_of(call, first + DOWN, moe->experts, moe->intermediate, hidden, *formats, &moe->down);
}

static struct mm_mps_stack mps_stack(struct mm_call *call, int first) {
    const struct mm_tensor *bias = tensor_at(call, first + 4);
    return (struct mm_mps_stack){tensor_at(call, first)->handle, tensor_at(call, first + 1)->handle,
                                 tensor_at(call, first + 2)->handle, tensor_at(call, first + 3)->handle,
                                 bias->numel ? bias->handle : NULL};
}

static bool run_moe_mps(struct mm_call *call, const struct mm_moe *moe, int64_t formats) {
    enum { X, WEIGHTS, IDS, GATE, UP = GATE + 5, DOWN = UP + 5 };
    for (int i = X; i <= IDS; i++)
        if (!make_contiguous(call, i)) return false;
    const struct mm_tensor *x = tensor_at(call, X);
    struct mm_mps_moe mps = {
        .x = x->handle,
        .weights = tensor_at(call, WEIGHTS)->handle,
        .ids = tensor_at(call, IDS)->handle,
        .y = call->outputs[0],
        .x_dtype = x->dtype,
        .weights_dtype = tensor_at(call, WEIGHTS)->dtype,
        .wide_ids = tensor_at(call, IDS)->dtype == mm_torch.aoti_torch_dtype_int64(),
        .device = {call->device_type, x->device_index},
        .gate = mps_stack(call, GATE),
        .up = mps_stack(call, UP),
        .down = mps_stack(call, DOWN),
        .tokens = moe->x.rows,
        .top_k = moe->weights.columns,
        .hidden = moe->x.columns,
        .intermediate = moe->intermediate,
        .experts = moe->experts,
        .formats = formats,
        .activation = moe->activation,
        .alpha = moe->alpha,
        .limit = moe->limit,
    };
    return mps_done(call, mm_mps_moe(&mps));
}

static bool run_moe_trellis_swiglu(struct mm_call *call) {
    enum { X, WEIGHTS, IDS };
    struct mm_moe moe = {0};
    int64_t formats;
    if (!moe_of(call, 0, &moe, &formats)) return false;
    void *y = rows_output(call, 0, tensor_at(call, X), moe.x.columns);
    if (y && on_mps(call)) return run_moe_mps(call, &moe, formats);
    int32_t *ids = y ? ids_of(call, tensor_at(call, IDS), moe.experts, moe.weights.columns) : NULL;
    if (!ids) return false;
    moe.ids = ids;
    bool done = mm_cpu_moe(&moe, y) || fail_memory(call);
    mm_free(ids);
    return done;
}

static bool run_moe_trellis_swiglu_backward(struct mm_call *call) {
    enum { GRAD, X, WEIGHTS, IDS };
    struct mm_moe moe = {0};
    struct mm_rows grad;
    int64_t formats;
    const struct mm_tensor *x = tensor_at(call, X), *weights = tensor_at(call, WEIGHTS);
    if (!moe_of(call, 1, &moe, &formats) || !rows_of(call, tensor_at(call, GRAD), &grad) ||
        !same_lead(call, tensor_at(call, GRAD), x))
        return false;
    if (grad.columns != moe.x.columns)
        return fail(call, "grad has %lld columns; x has %lld", (long long)grad.columns, (long long)moe.x.columns);
    void *dx = rows_output(call, 0, x, moe.x.columns);
    void *dweights = dx ? rows_output(call, 1, weights, moe.weights.columns) : NULL;
    int32_t *ids = dweights ? ids_of(call, tensor_at(call, IDS), moe.experts, moe.weights.columns) : NULL;
    if (!ids) return false;
    moe.ids = ids;
    bool done = mm_cpu_moe_backward(&moe, &grad, dx, dweights) || fail_memory(call);
    mm_free(ids);
    return done;
}

/* ---- router ---- */

static bool run_router(struct mm_call *call) {
    enum { X, GATE, CORRECTION, TOP_K, KIND, RENORMALIZE, SCALE, N_GROUP, TOPK_GROUP };
    const struct mm_tensor *x = tensor_at(call, X), *gate = tensor_at(call, GATE), *correction = tensor_at(call, CORRECTION);
    struct mm_router router = {
        .top_k = call->arguments[TOP_K].integer,
        .renormalize = call->arguments[RENORMALIZE].truth,
        .scale = (float)call->arguments[SCALE].number,
        .n_group = call->arguments[N_GROUP].integer,
        .topk_group = call->arguments[TOPK_GROUP].integer,
    };
    int kind = 0;
    if (!rows_of(call, x, &router.x) || !rows_of(call, gate, &router.gate) ||
        !find_name(call, KIND, router_names, MM_ROUTER_COUNT, &kind))
        return false;
    router.kind = (enum mm_router_kind)kind;
    int64_t experts = gate->sizes[0], groups = router.n_group;
    if (gate->dim != 2 || router.gate.columns != router.x.columns)
        return fail(call, "gate has shape %s; expected [experts, %lld], the last dimension of x", shape_text(gate).text,
                    (long long)router.x.columns);
    if (experts < 1 || experts > MM_MAX_EXPERTS)
        return fail(call, "gate has %lld experts; expected 1 to %d", (long long)experts, MM_MAX_EXPERTS);
    if (correction->numel) {
        if (!rows_of(call, correction, &router.correction)) return false;
        if (correction->dim != 1 || correction->sizes[0] != experts)
            return fail(call, "correction has shape %s; expected [%lld], the experts of gate, or an empty tensor",
                        shape_text(correction).text, (long long)experts);
    }
    if (router.top_k < 1 || router.top_k > MM_MAX_TOP_K || router.top_k > experts)
        return fail(call, "top_k is %lld; expected 1 to %lld (%lld experts, at most %d)", (long long)router.top_k,
                    (long long)(experts < MM_MAX_TOP_K ? experts : MM_MAX_TOP_K), (long long)experts, MM_MAX_TOP_K);
    if (groups < 1 || groups > experts || experts % groups)
        return fail(call, "n_group is %lld; expected a divisor of the %lld experts", (long long)groups,
                    (long long)experts);
    if (router.topk_group < 1 || router.topk_group > groups)
        return fail(call, "topk_group is %lld; expected 1 to n_group, %lld", (long long)router.topk_group,
                    (long long)groups);
    if (router.top_k > router.topk_group * (experts / groups))
        return fail(call, "top_k is %lld; %lld groups of %lld experts hold fewer", (long long)router.top_k,
                    (long long)router.topk_group, (long long)(experts / groups));
    int64_t sizes[64];
    for (int64_t d = 0; d + 1 < x->dim; d++) sizes[d] = x->sizes[d];
    sizes[x->dim - 1] = router.top_k;
    float *weights = new_output(call, 0, x->dim, sizes, mm_torch.aoti_torch_dtype_float32());
    int64_t *ids = weights ? new_output(call, 1, x->dim, sizes, mm_torch.aoti_torch_dtype_int64()) : NULL;
    sizes[x->dim - 1] = experts;
    float *logits = ids ? new_output(call, 2, x->dim, sizes, mm_torch.aoti_torch_dtype_float32()) : NULL;
    if (!logits || !on_mps(call)) return logits && (mm_cpu_router(&router, weights, ids, logits) || fail_memory(call));
    for (int i = X; i <= CORRECTION; i++)
        if (!make_contiguous(call, i)) return false;
    struct mm_mps_router run = {
        .x = x->handle,
        .gate = gate->handle,
        .correction = correction->numel ? correction->handle : NULL,
        .weights = call->outputs[0],
        .ids = call->outputs[1],
        .logits = call->outputs[2],
        .x_dtype = x->dtype,
        .gate_dtype = gate->dtype,
        .correction_dtype = correction->dtype,
        .tokens = router.x.rows,
        .hidden = router.x.columns,
        .experts = experts,
        .top_k = router.top_k,
        .n_group = router.n_group,
        .topk_group = router.topk_group,
        .kind = router.kind,
        .renormalize = router.renormalize,
        .scale = router.scale,
    };
    return mps_done(call, mm_mps_router(&run));
}

/* ---- trellis_quantize ---- */

/* Beyond binary16, and so beyond any codebook's value by 16,000: float32 costs would no longer tell values apart. */
#define MOST_QUANTIZED 65504.0f

static bool run_trellis_quantize(struct mm_call *call) {
    enum { TILES, RATE2, CODEBOOK };
    struct mm_argument *rate2 = &call->arguments[RATE2];
    int codebook;
    if (on_mps(call)) return fail(call, "tiles is on the MPS device; the search runs on the CPU, and expects its tiles there");
    if (!find_name(call, CODEBOOK, codebook_names, MM_CODEBOOK_COUNT, &codebook)) return false;
    if (!rate_exists(codebook, rate2->integer))
        return fail(call, "rate2 is %lld; expected twice the bits a weight: an even number from %d to %d%s for codebook %s",
                    (long long)rate2->integer, MM_MIN_RATE2, MM_MAX_RATE2, codebook_half_rates[codebook] ? ", or 3, 5 or 7," : "",
                    codebook_names[codebook]);
    const struct mm_tensor *tiles = tensor_at(call, TILES);
    if (tiles->dtype != mm_torch.aoti_torch_dtype_float32())
        return fail(call, "tiles has dtype %s; expected float32", dtype_name(tiles->dtype).text);
    if (tiles->dim < 2 || tiles->dim > 64 || tiles->sizes[tiles->dim - 2] != MM_TILE || tiles->sizes[tiles->dim - 1] != MM_TILE)
        return fail(call, "tiles has shape %s; expected [..., 16, 16]", shape_text(tiles).text);
    if (!make_contiguous(call, TILES)) return false;
    tiles = tensor_at(call, TILES);
    const float *x = tiles->data;
    for (int64_t i = 0; i < tiles->numel; i++)
        if (!(x[i] >= -MOST_QUANTIZED && x[i] <= MOST_QUANTIZED))
            return fail(call, "tiles holds %g in tile %lld, row %d, column %d; expected finite numbers, at most 65504 in size", (double)x[i],
                        (long long)(i / MM_TILE_WEIGHTS), (int)(i / MM_TILE % MM_TILE), (int)(i % MM_TILE));
    int64_t sizes[64];
    for (int64_t d = 0; d < tiles->dim; d++) sizes[d] = tiles->sizes[d];
    float *values = new_output(call, 1, tiles->dim, sizes, tiles->dtype);
    sizes[tiles->dim - 2] = MM_TILE_INT16(rate2->integer);
    void *stream = values ? new_output(call, 0, tiles->dim - 1, sizes, mm_torch.aoti_torch_dtype_int16()) : NULL;
    return stream && (mm_search(x, tiles->numel / MM_TILE_WEIGHTS, (int)rate2->integer, codebook, stream, values) || fail_memory(call));
}

/* ---- dispatch_kernel ---- */

static size_t list_length(struct mm_call *call, int index) {
    size_t length = 0;
    mm_torch.torch_list_size(call->arguments[index].list_handle, &length);
    return length;
}

static mm_stable_ivalue list_item(struct mm_call *call, int index, size_t item) {
    mm_stable_ivalue value = 0;
    mm_torch.torch_list_get_item(call->arguments[index].list_handle, item, &value);
    return value;
}

static int64_t list_int(struct mm_call *call, int index, size_t item) {
    mm_stable_ivalue value = list_item(call, index, item);
    int64_t integer;
    memcpy(&integer, &value, sizeof integer);
    return integer;
}

static bool lengths_of(struct mm_call *call, int index, uint64_t *lengths) {
    size_t count = list_length(call, index);
    if (count < 1 || count > 3)
        return fail(call, "%s has %zu lengths; expected 1 to 3", call->op->names[index], count);
    for (size_t i = 0; i < 3; i++) {
        int64_t length = i < count ? list_int(call, index, i) : 1;
        if (length < 1) return fail(call, "%s has length %lld; expected 1 or more", call->op->names[index], (long long)length);
        lengths[i] = (uint64_t)length;
    }
    return true;
}

/* A kernel of the caller's own on the MPS stream. layout: for each slot 0 a tensor, 1 an integer, 2 a float (its bits), taken in
 * order from `tensors` and `scalars`. */
static bool run_dispatch_kernel(struct mm_call *call) {
    enum { SOURCE, NAME, TENSORS, LAYOUT, SCALARS, GRID, GROUP };
    struct mm_dispatch dispatch = {0};
    mm_tensor_handle handles[MM_MAX_BINDINGS];
    size_t slots = list_length(call, LAYOUT), tensors = list_length(call, TENSORS), taken = 0, scalars = 0;
    bool done = lengths_of(call, GRID, dispatch.grid) && lengths_of(call, GROUP, dispatch.group);
    if (done && slots > MM_MAX_BINDINGS)
        done = fail(call, "args has %zu entries; Metal has %d buffer slots", slots, MM_MAX_BINDINGS);
    for (size_t slot = 0; done && slot < slots; slot++) {
        int64_t kind = list_int(call, LAYOUT, slot);
        if (kind == 0 && taken < tensors) {
            mm_stable_ivalue value = list_item(call, TENSORS, taken);
            memcpy(&handles[taken], &value, sizeof handles[taken]);
            struct mm_tensor tensor = {.handle = handles[taken++], .name = "args"};
            done = unbox_tensor(call, &tensor);
            mm_bind_tensor(&dispatch, (int)slot, tensor.handle);
        } else if (kind == 1 || kind == 2) {
            int64_t value = list_int(call, SCALARS, scalars++);
            float number;
            int32_t bits = (int32_t)value;
            memcpy(&number, &bits, sizeof number);
            if (kind == 1)
                mm_bind_int(&dispatch, (int)slot, value);
            else
                mm_bind_float(&dispatch, (int)slot, number);
        } else {
            done = fail(call, "layout has %lld at %zu; expected 0 (with a tensor left), 1 or 2", (long long)kind, slot);
        }
    }
    if (done && (!taken || !on_mps(call)))
        done = fail(call, "args has %s; expected at least one tensor, and all of them on the MPS device",
                    taken ? "tensors of another device" : "no tensor");
    const char *message = NULL;
    if (done) {
        dispatch.kernel = mm_mps_kernel_of(call->arguments[SOURCE].string, call->arguments[NAME].string, &message);
        done = mps_done(call, dispatch.kernel ? mm_mps_run(&dispatch, 1) : message);
    }
    for (size_t i = 0; i < taken; i++) mm_torch.aoti_torch_delete_tensor_object(handles[i]);
    return done;
}

/* ---- mapped_window ---- */

/* What _C.map_window has mapped, as a tensor. `like` only says where: on the MPS device. */
static bool run_mapped_window(struct mm_call *call) {
    enum { LIKE, WINDOW };
    const char *message = NULL;
    if (!on_mps(call)) return fail(call, "like is on the CPU; expected a tensor on the MPS device");
    call->outputs[0] = mm_mps_window_tensor(call->arguments[WINDOW].integer, tensor_at(call, LIKE)->device_index, &message);
    return call->outputs[0] || mps_done(call, message);
}

/* ---- registration ---- */

enum {
#define X(name, arguments, results) OP_##name,
    MM_OPS(X)
#undef X
    OP_COUNT
};

static struct mm_op ops[OP_COUNT];

#define X(name, arguments, results)                                                     \
    static void boxed_##name(mm_stable_ivalue *stack, uint64_t n_in, uint64_t n_out) { \
        run_boxed(&ops[OP_##name], stack, n_in, n_out);                                 \
    }
MM_OPS(X)
#undef X

static struct mm_op ops[OP_COUNT] = {
#define X(name, arguments, results) {.schema = #name "(" arguments ") -> " results, .run = run_##name, .boxed = boxed_##name},
    MM_OPS(X)
#undef X
};

/* Reads argument types and names off the schema, so that they stand nowhere else. */
static bool parse_schema(struct mm_op *op) {
    const char *text = strchr(op->schema, '(') + 1, *end = strstr(op->schema, ") -> ");
    while (text < end) {
        char type[16], name[sizeof op->names[0]];
        int length = 0;
        if (op->arguments == MM_MAX_ARGUMENTS || sscanf(text, "%15s %23[a-z_0-9]%n", type, name, &length) != 2) return false;
        op->types[op->arguments] = strstr(type, "[]") ? 'l' : type[0];
        memcpy(op->names[op->arguments++], name, sizeof name);
        text += length;
        while (text < end && *text != ',') text++; /* past a default */
        while (text < end && (*text == ',' || *text == ' ')) text++;
    }
    for (const char *result = end; (result = strstr(result, "Tensor")); result++) op->outputs++;
    return op->outputs <= MM_MAX_OUTPUTS;
}

static int thread_count(void) {
    uint32_t threads = 1;
    return mm_torch.torch_get_num_threads(&threads) ? 1 : (int)threads;
}

static void thread_run(int64_t begin, int64_t end, int64_t grain, mm_parallel_body body, void *context) {
    /* Items are pulled, so running the body again here, after a pool that failed, does only what is left. */
    if (mm_torch.torch_parallel_for(begin, end, grain, body, context)) body(begin, end, context);
}

bool mm_ops_register(const char **message) {
    /* Both live as long as the process: the dispatcher keeps pointers into them. */
    static mm_library_handle definitions, cpu_kernels, mps_kernels;
    mm_threads = (struct mm_threads){thread_count, thread_run};
    *message = "PyTorch refused the op library 'metal_marlin'; is another copy of it loaded?";
    if (mm_torch.aoti_torch_library_init_def("metal_marlin", __FILE__, __LINE__, &definitions) ||
        mm_torch.aoti_torch_library_init_impl("metal_marlin", "CPU", __FILE__, __LINE__, &cpu_kernels) ||
        mm_torch.aoti_torch_library_init_impl("metal_marlin", "MPS", __FILE__, __LINE__, &mps_kernels))
        return false;
    for (int i = 0; i < OP_COUNT; i++) {
        char name[64];
        struct mm_op *op = &ops[i];
        *message = op->schema;
        snprintf(name, sizeof name, "%.*s", (int)(strchr(op->schema, '(') - op->schema), op->schema);
        if (!parse_schema(op) || mm_torch.aoti_torch_library_def(definitions, op->schema) ||
            mm_torch.torch_library_impl(cpu_kernels, name, op->boxed, MM_TORCH_ABI_VERSION))
            return false;
        /* Gradients have no Metal kernels; ops.py gives MPS tensors a version made of torch's own ops. */
        if (!strstr(name, "_backward") && mm_torch.torch_library_impl(mps_kernels, name, op->boxed, MM_TORCH_ABI_VERSION))
            return false;
    }
    return true;
}
