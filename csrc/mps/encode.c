/* Bindings and launches: the one place that talks to torch's MPS shim about encoding.
 * All dispatches of an op go into one command block on PyTorch's stream, whose encoder is serial: each sees what the one
 * before wrote, without a barrier. */
#include <string.h>

#include "mps/mps.h"

void mm_bind_tensor(struct mm_dispatch *dispatch, int slot, mm_tensor_handle tensor) {
    dispatch->bindings[dispatch->binding_count++] = (struct mm_binding){.slot = slot, .tensor = tensor};
}

void mm_bind_int(struct mm_dispatch *dispatch, int slot, int64_t value) {
    dispatch->bindings[dispatch->binding_count++] = (struct mm_binding){.slot = slot, .integer = value};
}

void mm_bind_float(struct mm_dispatch *dispatch, int slot, float value) {
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    dispatch->bindings[dispatch->binding_count++] = (struct mm_binding){.slot = slot, .integer = bits, .is_float = true};
}

void mm_grid(struct mm_dispatch *dispatch, int64_t groups_x, int64_t groups_y, int64_t threads_a_group) {
    dispatch->grid[0] = (uint64_t)(groups_x * threads_a_group);
    dispatch->grid[1] = (uint64_t)groups_y;
    dispatch->group[0] = (uint64_t)threads_a_group;
    dispatch->grid[2] = dispatch->group[1] = dispatch->group[2] = 1;
}

struct block {
    const struct mm_dispatch *dispatches;
    int count;
    const char *message;
};

static bool bind(mm_metal_function kernel, const struct mm_binding *binding) {
    unsigned slot = (unsigned)binding->slot;
    if (binding->tensor) return !mm_mps.aoti_torch_mps_set_arg_tensor(kernel, slot, binding->tensor);
    if (binding->is_float && mm_mps.torch_mps_set_arg_bytes) {
        int32_t bits = (int32_t)binding->integer;
        return !mm_mps.torch_mps_set_arg_bytes(kernel, slot, &bits, sizeof bits);
    }
    /* 8 bytes; a kernel that declares a float reads the first 4, the float's own. */
    return !mm_mps.aoti_torch_mps_set_arg_int(kernel, slot, binding->integer);
}

static bool encode(const struct mm_dispatch *dispatch) {
    mm_metal_function kernel = dispatch->kernel;
    bool bound = !mm_mps.aoti_torch_mps_start_encoding(kernel);
    for (int i = 0; i < dispatch->binding_count && bound; i++) bound = bind(kernel, &dispatch->bindings[i]);
    return bound &&
           !mm_mps.aoti_torch_mps_dispatch_array_with_group_size(kernel, dispatch->grid, 3, dispatch->group, 3);
}

/* Runs on the stream's queue: no torch op, no Python, no second block in here. */
static void encode_block(mm_metal_function first, void *context) {
    struct block *block = context;
    (void)first;
    for (int i = 0; i < block->count && !block->message; i++)
        if (!encode(&block->dispatches[i])) block->message = "PyTorch's MPS stream refused a dispatch; see standard error";
}

const char *mm_mps_run(struct mm_dispatch *dispatches, int count) {
    struct block block = {dispatches, count, NULL};
    if (mm_mps.aoti_torch_mps_run_command_block(dispatches[0].kernel, encode_block, &block) && !block.message)
        block.message = "PyTorch's MPS stream refused a command block; see standard error";
    return block.message;
}

static void commit_block(mm_metal_function unused, void *context) {
    (void)unused, (void)context;
    mm_mps._ZN5torch3mps6commitEv();
}

const char *mm_mps_commit(void) {
    const char *message = NULL;
    if (mm_mps_device_type() < 0) return "there is no MPS backend in this process";
    if (!mm_mps._ZN5torch3mps6commitEv) return "this torch lacks torch::mps::commit()";
    /* From torch 2.15 on, commit aborts outside of the stream's queue, which only a command block runs on. A block is opened
     * with a kernel; this one is never launched. */
    mm_metal_function kernel = mm_mps_kernel_of("kernel void never_launched() {}\n", "never_launched", &message);
    if (!kernel) return message;
    return mm_mps.aoti_torch_mps_run_command_block(kernel, commit_block, NULL) ? "PyTorch's MPS stream refused a command block" : NULL;
}

mm_tensor_handle mm_mps_scratch(int64_t count, int32_t dtype, int32_t device_type, int32_t device_index) {
    mm_tensor_handle tensor = NULL;
    int64_t stride = 1;
    if (mm_torch.aoti_torch_empty_strided(1, &count, &stride, dtype, device_type, device_index, &tensor)) return NULL;
    return tensor;
}

const char *mm_metal_type(int32_t dtype) {
    if (dtype == mm_torch.aoti_torch_dtype_float32()) return "float";
    if (dtype == mm_torch.aoti_torch_dtype_float16()) return "half";
    if (dtype == mm_torch.aoti_torch_dtype_bfloat16()) return "bfloat";
    return NULL;
}

bool mm_format_in(int64_t formats, int codebook, int rate2) { return formats >> (16 * codebook + rate2 - 1) & 1; }
