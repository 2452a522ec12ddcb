/* All routed experts of a layer: the drivers of moe_trellis_swiglu and its gradient.
 * (token, expert) pairs are sorted by expert and cut into segments of up to 128 rows of one expert, so that each packed
 * tile is decoded once a segment; segments run in chunks that bound the scratch memory. Sums over a token's experts are
 * taken in the order of expert ids, whatever the chunk or thread, so results do not depend on either. */
#include <string.h>

#include "cpu/activation.h"
#include "cpu/cpu.h"

#define CHUNK_BYTES ((size_t)64 << 20)

struct segment {
    int64_t expert, first, rows; /* rows of the sorted pairs */
};

/* Rotated rows of a projection: of pairs in sorted order, ld floats apart. */
struct rotated {
    float *data;
    int64_t ld;
};

struct moe_run {
    const struct mm_moe *moe;
    const struct mm_rows *grad; /* backward only */
    int64_t top_k, pairs, hidden;
    int64_t threads; /* items are pulled in order: this many on is likely a thread's next */
    int64_t *order; /* [pairs]: the pair at each sorted place; pair = token * top_k + slot */
    struct segment *segments;
    int64_t segment_count;
    /* The chunk: segments [first_segment, last_segment), pairs [first_pair, first_pair + chunk_pairs). */
    int64_t first_segment, last_segment, first_pair, chunk_pairs, max_rows;
    /* Rows of the chunk, in sorted order. "blocked" is [128-column block, pair, 128]. */
    struct rotated in_gate, in_up, in_down;
    float *y;                                  /* blocked: down's output, or the gradient of x for each pair */
    float *gate, *up;                          /* backward, blocked: pre-activations */
    float *spread_grad, *spread_gate, *spread_up; /* backward, spread [4 n] */
    float *dgate, *dup;                        /* backward, [intermediate, padded] a row */
    float *dweight;                            /* backward, [block of intermediate, pair] */
    float *sum;                                /* [tokens, hidden] float32 result */
};

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static float *blocked(const struct moe_run *run, float *base, int64_t block, const struct segment *segment) {
    return base + (block * run->chunk_pairs + segment->first - run->first_pair) * MM_HADAMARD;
}

static int64_t token_of(const struct moe_run *run, int64_t place) { return run->order[place] / run->top_k; }

static float routing_weight(const struct moe_run *run, int64_t place) {
    const struct mm_rows *weights = &run->moe->weights;
    int64_t slot = run->order[place] % run->top_k;
    const char *row = mm_rows_at(weights, token_of(run, place));
    float weight;
    mm_cpu->load(&weight, row + slot * weights->column_stride * (int64_t)mm_float_bytes(weights->type), weights->type,
                 1, 1);
    return weight;
}

static int codebook_of(const struct mm_stack *stack, int64_t expert) { return (int)stack->table[3 * expert + 2]; }

/* Room for a rotated row whatever its expert: their codebooks may differ. */
static int64_t longest_row(const struct mm_stack *stack, int64_t experts) {
    int64_t most = 0;
    for (int64_t e = 0; e < experts; e++) {
        int64_t floats = mm_cpu->row_floats(codebook_of(stack, e));
        if (floats > most) most = floats;
    }
    return mm_row_stride(stack->k / MM_HADAMARD * most);
}

/* The rotated row of `place`, from its channel `column` on. */
static float *row_at(const struct moe_run *run, const struct rotated *rows, const struct mm_stack *stack, int64_t expert, int64_t place,
                     int64_t column) {
    return rows->data + (place - run->first_pair) * rows->ld +
           column / MM_HADAMARD * mm_cpu->row_floats(codebook_of(stack, expert));
}

static void load_token(float *row, const struct mm_rows *rows, int64_t token) {
    mm_cpu->load(row, mm_rows_at(rows, token), rows->type, rows->column_stride, rows->columns);
    memset(row + rows->columns, 0, (size_t)(MM_PAD(rows->columns) - rows->columns) * sizeof *row);
}

/* The segment and 128-column block that an item names; blocks of one segment are neighbours. */
static const struct segment *segment_of(const struct moe_run *run, int64_t item, int64_t blocks, int64_t *block) {
    *block = item % blocks;
    return &run->segments[run->first_segment + item / blocks];
}

/* How many rows the segment of `place` has. */
static int64_t rows_beside(const struct moe_run *run, int64_t place) {
    int64_t first = run->first_segment, last = run->last_segment; /* it is in [first, last) */
    while (last - first > 1) {
        int64_t middle = first + (last - first) / 2;
        if (run->segments[middle].first <= place)
            first = middle;
        else
            last = middle;
    }
    return run->segments[first].rows;
}

/* ---- forward ---- */

static void rotate_token(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    const struct mm_stack *gate = &run->moe->gate, *up = &run->moe->up;
    int64_t place = run->first_pair + item, expert = run->moe->ids[run->order[place]];
    int64_t rows = rows_beside(run, place);
    load_token(scratch, &run->moe->x, token_of(run, place));
    mm_cpu->rotate_in(row_at(run, &run->in_gate, gate, expert, place, 0), scratch, gate->suh + expert * gate->k, gate->k,
                      run->hidden, codebook_of(gate, expert), rows);
    mm_cpu->rotate_in(row_at(run, &run->in_up, up, expert, place, 0), scratch, up->suh + expert * up->k, up->k, run->hidden,
                      codebook_of(up, expert), rows);
}

/* Where an item's tiles begin; NULL past the phase's last one. */
static const uint8_t *tiles_of(const struct moe_run *run, const struct mm_stack *stack, int64_t item) {
    int64_t block, blocks = stack->n / MM_HADAMARD;
    if (item >= (run->last_segment - run->first_segment) * blocks) return NULL;
    struct mm_weight weight = mm_stack_weight(stack, segment_of(run, item, blocks, &block)->expert);
    return mm_weight_block(&weight, block);
}

/* y [rows, 128]: one block of a projection's output for a segment; next (may be NULL) as in struct mm_weight */
static void project(float *y, const struct moe_run *run, const struct mm_stack *stack, const struct rotated *rows,
                    const struct segment *segment, int64_t block, const uint8_t *next, float *scratch) {
    struct mm_weight weight = mm_stack_weight(stack, segment->expert);
    weight.next = next;
    int64_t column = block * MM_HADAMARD;
    mm_cpu->multiply(y, &weight, block, row_at(run, rows, stack, segment->expert, segment->first, 0), rows->ld,
                     segment->rows, scratch);
    mm_cpu->rotate_out(y, segment->rows, weight.svh + column, weight.bias ? weight.bias + column : NULL);
}

static void gate_up_block(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    const struct mm_moe *moe = run->moe;
    int64_t block, blocks = moe->gate.n / MM_HADAMARD;
    const struct segment *segment = segment_of(run, item, blocks, &block);
    int64_t size = segment->rows * MM_HADAMARD, column = block * MM_HADAMARD;
    float *gate = scratch, *up = gate + size, *act = up + size, *rest = act + size;
    int64_t items = (run->last_segment - run->first_segment) * blocks, then = item + run->threads;
    project(gate, run, &moe->gate, &run->in_gate, segment, block, tiles_of(run, &moe->up, item), rest);
    project(up, run, &moe->up, &run->in_up, segment, block,
            then < items ? tiles_of(run, &moe->gate, then) : tiles_of(run, &moe->down, then - items), rest);
    mm_cpu->activate(act, gate, up, size, moe->activation, moe->alpha, moe->limit);
    const uint16_t *suh = moe->down.suh + segment->expert * moe->down.k + column;
    for (int64_t r = 0; r < segment->rows; r++)
        mm_cpu->rotate_in(row_at(run, &run->in_down, &moe->down, segment->expert, segment->first + r, column),
                          act + r * MM_HADAMARD, suh, MM_HADAMARD, moe->intermediate - column,
                          codebook_of(&moe->down, segment->expert), segment->rows);
}

static void down_block(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    int64_t block;
    const struct segment *segment = segment_of(run, item, run->moe->down.n / MM_HADAMARD, &block);
    project(blocked(run, run->y, block, segment), run, &run->moe->down, &run->in_down, segment, block,
            tiles_of(run, &run->moe->down, item + run->threads), scratch);
}

/* Adds the chunk's pairs to their tokens, one block of columns an item: sorted order, so expert by expert. */
static void combine_block(int64_t block, void *scratch, void *context) {
    const struct moe_run *run = context;
    (void)scratch;
    int64_t column = block * MM_HADAMARD, columns = min64(run->hidden - column, MM_HADAMARD);
    for (int64_t i = 0; i < run->chunk_pairs; i++) {
        int64_t place = run->first_pair + i;
        float weight = run->grad ? 1.0f : routing_weight(run, place);
        float *sum = run->sum + token_of(run, place) * run->hidden + column;
        const float *y = run->y + (block * run->chunk_pairs + i) * MM_HADAMARD;
        for (int64_t c = 0; c < columns; c++) sum[c] += weight * y[c];
    }
}

static size_t product_scratch(const struct moe_run *run, int64_t buffers) {
    return (size_t)(buffers * run->max_rows * MM_HADAMARD + MM_MULTIPLY_SCRATCH) * sizeof(float);
}

static bool forward_chunk(struct moe_run *run) {
    const struct mm_moe *moe = run->moe;
    int64_t segments = run->last_segment - run->first_segment;
    return MM_PARALLEL(run, {run->chunk_pairs, (size_t)moe->gate.k * sizeof(float), rotate_token},
                       {segments * (moe->gate.n / MM_HADAMARD), product_scratch(run, 3), gate_up_block},
                       {segments * (moe->down.n / MM_HADAMARD), product_scratch(run, 0), down_block},
                       {moe->down.n / MM_HADAMARD, 0, combine_block});
}

/* ---- backward ---- */

static void rotate_token_and_grad(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    const struct mm_stack *down = &run->moe->down;
    int64_t place = run->first_pair + item, expert = run->moe->ids[run->order[place]];
    rotate_token(item, scratch, context);
    load_token(scratch, run->grad, token_of(run, place));
    mm_cpu->rotate_grad(run->spread_grad + item * 4 * down->n, scratch, down->svh + expert * down->n, down->n,
                        run->hidden);
}

static void gate_up_again(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    int64_t block;
    const struct segment *segment = segment_of(run, item, run->moe->gate.n / MM_HADAMARD, &block);
    project(blocked(run, run->gate, block, segment), run, &run->moe->gate, &run->in_gate, segment, block,
            tiles_of(run, &run->moe->up, item), scratch);
    project(blocked(run, run->up, block, segment), run, &run->moe->up, &run->in_up, segment, block,
            tiles_of(run, &run->moe->gate, item + run->threads), scratch);
}

/* dx [rows, 128]: one block of the gradient of a projection's input for a segment */
static void project_back(float *dx, const struct moe_run *run, const struct mm_stack *stack, const float *spread,
                         const struct segment *segment, int64_t block, float *scratch) {
    struct mm_weight weight = mm_stack_weight(stack, segment->expert);
    mm_cpu->multiply_transposed(dx, &weight, block, spread + (segment->first - run->first_pair) * 4 * stack->n,
                                segment->rows, scratch);
    mm_cpu->rotate_out(dx, segment->rows, weight.suh + block * MM_HADAMARD, NULL);
}

/* With y = act W_down: d act = w W_down grad; d w = grad . y = (W_down grad) . act (+ grad . bias, added later). */
static void activation_back(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    const struct mm_moe *moe = run->moe;
    int64_t block, width = moe->down.k;
    const struct segment *segment = segment_of(run, item, width / MM_HADAMARD, &block);
    int64_t column = block * MM_HADAMARD, columns = min64(moe->intermediate - column, MM_HADAMARD);
    int64_t size = segment->rows * MM_HADAMARD;
    float *dact = scratch, *act = dact + size, *rest = act + size;
    const float *gate = blocked(run, run->gate, block, segment), *up = blocked(run, run->up, block, segment);
    project_back(dact, run, &moe->down, run->spread_grad, segment, block, rest);
    mm_cpu->activate(act, gate, up, size, moe->activation, moe->alpha, moe->limit);
    for (int64_t r = 0; r < segment->rows; r++) {
        int64_t row = segment->first - run->first_pair + r;
        float weight = routing_weight(run, segment->first + r);
        float *dgate = run->dgate + row * width + column, *dup = run->dup + row * width + column;
        run->dweight[block * run->chunk_pairs + row] =
            mm_cpu->dot(dact + r * MM_HADAMARD, act + r * MM_HADAMARD, columns > 0 ? columns : 0);
        for (int64_t c = 0; c < MM_HADAMARD; c++) {
            int64_t i = r * MM_HADAMARD + c;
            struct mm_slopes slopes = {0, 0};
            if (c < columns) slopes = mm_activation_slopes(moe->activation, gate[i], up[i], moe->alpha, moe->limit);
            dgate[c] = c < columns ? weight * dact[i] * slopes.gate : 0;
            dup[c] = c < columns ? weight * dact[i] * slopes.up : 0;
        }
    }
}

static void rotate_activation_grads(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    const struct mm_stack *gate = &run->moe->gate, *up = &run->moe->up;
    int64_t expert = run->moe->ids[run->order[run->first_pair + item]], width = run->moe->down.k;
    (void)scratch;
    mm_cpu->rotate_grad(run->spread_gate + item * 4 * gate->n, run->dgate + item * width, gate->svh + expert * gate->n,
                        gate->n, run->moe->intermediate);
    mm_cpu->rotate_grad(run->spread_up + item * 4 * up->n, run->dup + item * width, up->svh + expert * up->n, up->n,
                        run->moe->intermediate);
}

static void input_back(int64_t item, void *scratch, void *context) {
    const struct moe_run *run = context;
    int64_t block;
    const struct segment *segment = segment_of(run, item, run->moe->gate.k / MM_HADAMARD, &block);
    int64_t size = segment->rows * MM_HADAMARD;
    float *dx = blocked(run, run->y, block, segment), *from_up = scratch;
    project_back(dx, run, &run->moe->gate, run->spread_gate, segment, block, from_up + size);
    project_back(from_up, run, &run->moe->up, run->spread_up, segment, block, from_up + size);
    for (int64_t i = 0; i < size; i++) dx[i] += from_up[i];
}

static bool backward_chunk(struct moe_run *run) {
    const struct mm_moe *moe = run->moe;
    int64_t segments = run->last_segment - run->first_segment, blocks = moe->gate.n / MM_HADAMARD;
    int64_t hidden_blocks = moe->gate.k / MM_HADAMARD;
    return MM_PARALLEL(run, {run->chunk_pairs, (size_t)moe->gate.k * sizeof(float), rotate_token_and_grad},
                       {segments * blocks, product_scratch(run, 0), gate_up_again},
                       {segments * blocks, product_scratch(run, 2), activation_back},
                       {run->chunk_pairs, 0, rotate_activation_grads},
                       {segments * hidden_blocks, product_scratch(run, 1), input_back},
                       {hidden_blocks, 0, combine_block});
}

/* dweights [tokens, top_k] of the chunk: the blocks in order, then the bias */
static void store_weight_grads(const struct moe_run *run, void *dweights, float *row) {
    const struct mm_stack *down = &run->moe->down;
    enum mm_float type = run->moe->weights.type;
    float *bias = row + down->n;
    for (int64_t i = 0; i < run->chunk_pairs; i++) {
        int64_t place = run->first_pair + i, expert = run->moe->ids[run->order[place]];
        float sum = 0;
        for (int64_t block = 0; block < down->k / MM_HADAMARD; block++) sum += run->dweight[block * run->chunk_pairs + i];
        if (down->bias) {
            load_token(row, run->grad, token_of(run, place));
            mm_cpu->load(bias, down->bias + expert * down->n, MM_FLOAT16, 1, down->n);
            sum += mm_cpu->dot(row, bias, run->hidden);
        }
        mm_cpu->store((char *)dweights + run->order[place] * (int64_t)mm_float_bytes(type), &sum, type, 1);
    }
}

/* ---- both ways ---- */

static void store_token(int64_t token, void *scratch, void *context) {
    void **ends = context; /* run, output */
    const struct moe_run *run = ends[0];
    (void)scratch;
    enum mm_float type = run->moe->x.type;
    mm_cpu->store((char *)ends[1] + token * run->hidden * (int64_t)mm_float_bytes(type),
                  run->sum + token * run->hidden, type, run->hidden);
}

/* Counting sort by expert (stable, so by token within an expert), then segments. Slots without an expert are left out. */
static void sort_pairs(struct moe_run *run, int64_t *starts) {
    const int32_t *ids = run->moe->ids;
    int64_t experts = run->moe->experts;
    memset(starts, 0, (size_t)(experts + 1) * sizeof *starts);
    for (int64_t p = 0; p < run->pairs; p++)
        if (ids[p] != MM_NO_EXPERT) starts[ids[p] + 1]++;
    for (int64_t e = 0; e < experts; e++) {
        for (int64_t r = 0; r < starts[e + 1]; r += MM_ROW_BLOCK)
            run->segments[run->segment_count++] =
                (struct segment){e, starts[e] + r, min64(starts[e + 1] - r, MM_ROW_BLOCK)};
        starts[e + 1] += starts[e];
    }
    for (int64_t p = 0; p < run->pairs; p++)
        if (ids[p] != MM_NO_EXPERT) run->order[starts[ids[p]]++] = p;
}

/* The next chunk: whole segments, as many as `most` pairs hold, at least one. */
static bool next_chunk(struct moe_run *run, int64_t most) {
    run->first_segment = run->last_segment;
    run->first_pair += run->chunk_pairs;
    run->chunk_pairs = run->max_rows = 0;
    while (run->last_segment < run->segment_count) {
        int64_t rows = run->segments[run->last_segment].rows;
        if (run->chunk_pairs && run->chunk_pairs + rows > most) break;
        run->chunk_pairs += rows;
        if (rows > run->max_rows) run->max_rows = rows;
        run->last_segment++;
    }
    return run->chunk_pairs > 0;
}

/* Cuts `count` floats a pair off the chunk's memory; a null cursor only counts. */
static void carve(float **buffer, float **cursor, int64_t *floats, int64_t pairs, int64_t count) {
    *floats += count;
    if (*cursor) {
        *buffer = *cursor;
        *cursor += pairs * count;
    }
}

static int64_t carve_chunk(struct moe_run *run, float *memory, int64_t pairs) {
    const struct mm_moe *moe = run->moe;
    int64_t floats = 0;
    carve(&run->in_gate.data, &memory, &floats, pairs, run->in_gate.ld);
    carve(&run->in_up.data, &memory, &floats, pairs, run->in_up.ld);
    carve(&run->y, &memory, &floats, pairs, moe->down.n);
    if (!run->grad) {
        carve(&run->in_down.data, &memory, &floats, pairs, run->in_down.ld);
        return floats;
    }
    carve(&run->gate, &memory, &floats, pairs, moe->gate.n);
    carve(&run->up, &memory, &floats, pairs, moe->up.n);
    carve(&run->spread_grad, &memory, &floats, pairs, 4 * moe->down.n);
    carve(&run->spread_gate, &memory, &floats, pairs, 4 * moe->gate.n);
    carve(&run->spread_up, &memory, &floats, pairs, 4 * moe->up.n);
    carve(&run->dgate, &memory, &floats, pairs, moe->down.k);
    carve(&run->dup, &memory, &floats, pairs, moe->down.k);
    /* Rounded up to a multiple of 16 a pair, so that every buffer starts on a cache line. */
    carve(&run->dweight, &memory, &floats, pairs, (moe->down.k / MM_HADAMARD + 15) / 16 * 16);
    return floats;
}

static bool run_moe(struct moe_run *run, void *out, void *dweights) {
    const struct mm_moe *moe = run->moe;
    int64_t tokens = moe->x.rows, experts = moe->experts;
    run->top_k = moe->weights.columns;
    run->pairs = tokens * run->top_k;
    run->hidden = moe->x.columns;
    run->threads = mm_threads.count();
    run->in_gate.ld = longest_row(&moe->gate, experts);
    run->in_up.ld = longest_row(&moe->up, experts);
    run->in_down.ld = longest_row(&moe->down, experts);
    if (!tokens) return true;
    bool wide = moe->x.type == MM_FLOAT32;
    size_t sum_bytes = (size_t)(tokens * run->hidden) * sizeof(float);
    int64_t pair_floats = carve_chunk(run, NULL, 0);
    int64_t most = (int64_t)(CHUNK_BYTES / sizeof(float)) / pair_floats, most_segments = run->pairs / MM_ROW_BLOCK + experts;
    if (most < MM_ROW_BLOCK) most = MM_ROW_BLOCK;
    if (most > run->pairs) most = run->pairs;
    run->order = mm_alloc((size_t)run->pairs * sizeof *run->order);
    run->segments = mm_alloc((size_t)most_segments * sizeof *run->segments);
    run->sum = wide ? out : mm_alloc(sum_bytes);
    int64_t *starts = mm_alloc((size_t)(experts + 1) * sizeof *starts);
    float *memory = mm_alloc((size_t)(most * pair_floats) * sizeof(float));
    float *row = mm_alloc((size_t)(2 * moe->down.n) * sizeof(float));
    bool done = run->order && run->segments && run->sum && starts && memory && row;
    if (done) {
        memset(run->sum, 0, sum_bytes);
        if (dweights) memset(dweights, 0, (size_t)run->pairs * mm_float_bytes(moe->weights.type));
        sort_pairs(run, starts);
        while (done && next_chunk(run, most)) {
            carve_chunk(run, memory, run->chunk_pairs);
            done = run->grad ? backward_chunk(run) : forward_chunk(run);
            if (done && dweights) store_weight_grads(run, dweights, row);
        }
        if (done && !wide) done = MM_PARALLEL(((void *[]){run, out}), {tokens, 0, store_token});
    }
    if (!wide) mm_free(run->sum);
    mm_free(row);
    mm_free(memory);
    mm_free(starts);
    mm_free(run->segments);
    mm_free(run->order);
    return done;
}

bool mm_cpu_moe(const struct mm_moe *moe, void *y) {
    struct moe_run run = {.moe = moe};
    return run_moe(&run, y, NULL);
}

bool mm_cpu_moe_backward(const struct mm_moe *moe, const struct mm_rows *grad, void *dx, void *dweights) {
    struct moe_run run = {.moe = moe, .grad = grad};
    return run_moe(&run, dx, dweights);
}
