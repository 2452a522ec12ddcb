/* Encoders of moe_trellis_swiglu: two dispatches for up to MM_DECODE_ROWS tokens, four for each chunk of more.
 * Grids are sized for the worst routing, since the host never sees it. */
#include <stdio.h>

#include "mps/mps.h"

/* Tokens of a prefill chunk: bounds the scratch memory (4 bytes x top_k x (hidden + intermediate) a token). */
#define CHUNK_TOKENS 1024

static void append(char *text, size_t size, size_t *length, const char *format, int a, int b) {
    if (*length < size) *length += (size_t)snprintf(text + *length, size - *length, format, a, b);
}

/* The variant's #define lines. */
static void write_prefix(const struct mm_mps_moe *moe, int rows, char *text, size_t size) {
    size_t length = (size_t)snprintf(
        text, size,
        "#define MM_T %s\n#define MM_W %s\n#define MM_ID %s\n#define MM_ROWS %d\n#define MM_ACTIVATION %d\n"
        "#define MM_HAS_GATE_BIAS %s\n#define MM_HAS_UP_BIAS %s\n#define MM_HAS_DOWN_BIAS %s\n#define MM_CASES(X)",
        mm_metal_type(moe->x_dtype), mm_metal_type(moe->weights_dtype), moe->wide_ids ? "long" : "int", rows,
        (int)moe->activation, moe->gate.bias ? "true" : "false", moe->up.bias ? "true" : "false",
        moe->down.bias ? "true" : "false");
    for (int codebook = 0; codebook < MM_CODEBOOK_COUNT; codebook++)
        for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++)
            if (mm_format_in(moe->formats, codebook, rate2)) append(text, size, &length, " X(%d, %d)", codebook, rate2);
    append(text, size, &length, "\n", 0, 0);
}

static void bind_stack(struct mm_dispatch *dispatch, int slot, const struct mm_mps_stack *stack) {
    mm_bind_tensor(dispatch, slot + STACK_TRELLIS, stack->trellis);
    mm_bind_tensor(dispatch, slot + STACK_TABLE, stack->table);
    mm_bind_tensor(dispatch, slot + STACK_SUH, stack->suh);
    mm_bind_tensor(dispatch, slot + STACK_SVH, stack->svh);
    mm_bind_tensor(dispatch, slot + STACK_BIAS, stack->bias ? stack->bias : stack->svh);
}

/* What the decode and the prefill kernels of one projection both take. */
static void bind_gate_up(struct mm_dispatch *dispatch, const struct mm_mps_moe *moe, mm_tensor_handle act) {
    mm_bind_tensor(dispatch, MOE_X, moe->x);
    mm_bind_tensor(dispatch, MOE_ACT, act);
    bind_stack(dispatch, MOE_GATE, &moe->gate);
    bind_stack(dispatch, MOE_UP, &moe->up);
    mm_bind_tensor(dispatch, MOE_DOWN_SUH, moe->down.suh);
    mm_bind_int(dispatch, MOE_TOP_K, moe->top_k);
    mm_bind_int(dispatch, MOE_HIDDEN, moe->hidden);
    mm_bind_int(dispatch, MOE_INTERMEDIATE, moe->intermediate);
    mm_bind_float(dispatch, MOE_ALPHA, moe->alpha);
    mm_bind_float(dispatch, MOE_LIMIT, moe->limit);
}

static void bind_down(struct mm_dispatch *dispatch, const struct mm_mps_moe *moe, mm_tensor_handle act,
                      mm_tensor_handle y) {
    mm_bind_tensor(dispatch, DOWN_ACT, act);
    mm_bind_tensor(dispatch, DOWN_WEIGHTS, moe->weights);
    mm_bind_tensor(dispatch, DOWN_Y, y);
    bind_stack(dispatch, DOWN_STACK, &moe->down);
    mm_bind_int(dispatch, DOWN_TOP_K, moe->top_k);
    mm_bind_int(dispatch, DOWN_HIDDEN, moe->hidden);
    mm_bind_int(dispatch, DOWN_INTERMEDIATE, moe->intermediate);
}

static const char *find_kernels(struct mm_dispatch *dispatches, enum mm_metal_source source, const char *prefix,
                                const char *const *names, int count) {
    const char *message = NULL;
    for (int i = 0; i < count; i++) {
        dispatches[i].kernel = mm_mps_kernel(source, prefix, names[i], &message);
        if (!dispatches[i].kernel) return message;
    }
    return NULL;
}

static const char *decode(const struct mm_mps_moe *moe) {
    static const char *const names[] = {"moe_gate_up_decode", "moe_down_decode"};
    struct mm_dispatch dispatches[2] = {0};
    char prefix[1024];
    int rows = 1;
    while (rows < moe->tokens) rows *= 2;
    write_prefix(moe, rows, prefix, sizeof prefix);
    const char *message = find_kernels(dispatches, MM_METAL_moe_decode, prefix, names, 2);
    if (message) return message;
    int64_t pairs = moe->tokens * moe->top_k, width = MM_PAD(moe->intermediate);
    mm_tensor_handle act =
        mm_mps_scratch(pairs * width, mm_torch.aoti_torch_dtype_float32(), moe->device.type, moe->device.index);
    if (!act) return "out of memory for scratch buffers";
    bind_gate_up(&dispatches[0], moe, act);
    mm_bind_tensor(&dispatches[0], MOE_IDS, moe->ids);
    mm_bind_int(&dispatches[0], MOE_TOKENS, moe->tokens);
    mm_bind_int(&dispatches[0], MOE_EXPERTS, moe->experts);
    mm_grid(&dispatches[0], width / MM_HADAMARD, pairs, MM_DECODE_THREADS);
    bind_down(&dispatches[1], moe, act, moe->y);
    mm_bind_tensor(&dispatches[1], DOWN_IDS, moe->ids);
    mm_bind_int(&dispatches[1], DOWN_TOKENS, moe->tokens);
    mm_bind_int(&dispatches[1], DOWN_EXPERTS, moe->experts);
    mm_grid(&dispatches[1], MM_PAD(moe->hidden) / MM_HADAMARD, 1, MM_DECODE_THREADS);
    message = mm_mps_run(dispatches, 2);
    mm_torch.aoti_torch_delete_tensor_object(act);
    return message;
}

struct prefill_scratch {
    mm_tensor_handle order, tiles, act, parts;
};

static void encode_chunk(const struct mm_mps_moe *moe, const struct prefill_scratch *scratch, int64_t first,
                         int64_t tokens, struct mm_dispatch *dispatches) {
    int64_t pairs = tokens * moe->top_k, most_tiles = pairs / MM_PREFILL_ROWS + moe->experts;
    struct mm_dispatch *sort = &dispatches[0], *gate_up = &dispatches[1], *down = &dispatches[2], *combine = &dispatches[3];
    for (int i = 0; i < 4; i++) dispatches[i].binding_count = 0;
    mm_bind_tensor(sort, SORT_IDS, moe->ids);
    mm_bind_tensor(sort, SORT_ORDER, scratch->order);
    mm_bind_tensor(sort, SORT_TILES, scratch->tiles);
    mm_bind_int(sort, SORT_PAIRS, pairs);
    mm_bind_int(sort, SORT_EXPERTS, moe->experts);
    mm_bind_int(sort, SORT_MOST_TILES, most_tiles);
    mm_bind_int(sort, SORT_FIRST, first * moe->top_k);
    mm_grid(sort, 1, 1, MM_SORT_THREADS);
    bind_gate_up(gate_up, moe, scratch->act);
    mm_bind_tensor(gate_up, MOE_ORDER, scratch->order);
    mm_bind_tensor(gate_up, MOE_TILES, scratch->tiles);
    mm_bind_int(gate_up, MOE_FIRST, first);
    mm_grid(gate_up, MM_PAD(moe->intermediate) / MM_HADAMARD, most_tiles, MM_PREFILL_THREADS);
    bind_down(down, moe, scratch->act, scratch->parts);
    mm_bind_tensor(down, DOWN_ORDER, scratch->order);
    mm_bind_tensor(down, DOWN_TILES, scratch->tiles);
    mm_bind_int(down, DOWN_FIRST, first);
    mm_grid(down, MM_PAD(moe->hidden) / MM_HADAMARD, most_tiles, MM_PREFILL_THREADS);
    mm_bind_tensor(combine, COMBINE_PARTS, scratch->parts);
    mm_bind_tensor(combine, COMBINE_Y, moe->y);
    mm_bind_tensor(combine, COMBINE_IDS, moe->ids);
    mm_bind_int(combine, COMBINE_TOP_K, moe->top_k);
    mm_bind_int(combine, COMBINE_HIDDEN, moe->hidden);
    mm_bind_int(combine, COMBINE_EXPERTS, moe->experts);
    mm_bind_int(combine, COMBINE_FIRST, first);
    combine->grid[0] = (uint64_t)moe->hidden;
    combine->grid[1] = (uint64_t)tokens;
    combine->group[0] = moe->hidden < 256 ? (uint64_t)moe->hidden : 256;
    combine->grid[2] = combine->group[1] = combine->group[2] = 1;
}

static const char *prefill(const struct mm_mps_moe *moe) {
    static const char *const names[] = {"moe_sort", "moe_gate_up_prefill", "moe_down_prefill", "moe_combine"};
    struct mm_dispatch dispatches[4] = {0};
    char prefix[1024];
    write_prefix(moe, 1, prefix, sizeof prefix);
    const char *message = find_kernels(dispatches, MM_METAL_moe_prefill, prefix, names, 4);
    if (message) return message;
    int64_t chunk = moe->tokens < CHUNK_TOKENS ? moe->tokens : CHUNK_TOKENS, pairs = chunk * moe->top_k;
    int64_t most_tiles = pairs / MM_PREFILL_ROWS + moe->experts;
    int32_t float32 = mm_torch.aoti_torch_dtype_float32(), int32 = mm_torch.aoti_torch_dtype_int32();
    struct mm_mps_device device = moe->device;
    struct prefill_scratch scratch = {
        .order = mm_mps_scratch(pairs, int32, device.type, device.index),
        .tiles = mm_mps_scratch(most_tiles * MM_TILE_ENTRY, int32, device.type, device.index),
        .act = mm_mps_scratch(pairs * MM_PAD(moe->intermediate), float32, device.type, device.index),
        .parts = mm_mps_scratch(pairs * moe->hidden, float32, device.type, device.index),
    };
    bool have = scratch.order && scratch.tiles && scratch.act && scratch.parts;
    message = have ? NULL : "out of memory for scratch buffers";
    for (int64_t first = 0; !message && first < moe->tokens; first += chunk) {
        int64_t tokens = moe->tokens - first < chunk ? moe->tokens - first : chunk;
        encode_chunk(moe, &scratch, first, tokens, dispatches);
        message = mm_mps_run(dispatches, 4);
    }
    mm_tensor_handle handles[] = {scratch.order, scratch.tiles, scratch.act, scratch.parts};
    for (int i = 0; i < 4; i++)
        if (handles[i]) mm_torch.aoti_torch_delete_tensor_object(handles[i]);
    return message;
}

const char *mm_mps_moe(const struct mm_mps_moe *moe) {
    if (!moe->tokens) return NULL;
    return moe->tokens <= MM_DECODE_ROWS ? decode(moe) : prefill(moe);
}
