/* The router: gate product, scores, and the top k, with its weights. Kinds are listed in shared/router.h.
 * The order is total: higher score first, a NaN above all numbers, equal scores by index; so ids are always distinct
 * and in range, whatever x holds. */
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"

#define EXPERTS_A_BLOCK 16
#define TOKENS_A_BLOCK 24

struct router_run {
    const struct mm_router *router;
    float *weights, *logits;
    int64_t *ids;
    int64_t experts, hidden;
};

/* Rows first .. first + count - 1 as floats: where they lie, if they are floats already, else copies in `room`. */
static float *rows_as_floats(const float **rows, float *room, const struct mm_rows *from, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        const void *row = mm_rows_at(from, first + i);
        if (from->type == MM_FLOAT32 && from->column_stride == 1) {
            rows[i] = row;
            continue;
        }
        mm_cpu->load(room, row, from->type, from->column_stride, from->columns);
        rows[i] = room;
        room += from->columns;
    }
    return room;
}

static int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

static void logits_block(int64_t item, void *scratch, void *context) {
    const struct router_run *run = context;
    const struct mm_rows *x = &run->router->x, *gate = &run->router->gate;
    const float *tokens[TOKENS_A_BLOCK], *experts[EXPERTS_A_BLOCK];
    int64_t blocks = (run->experts + EXPERTS_A_BLOCK - 1) / EXPERTS_A_BLOCK;
    int64_t expert = item % blocks * EXPERTS_A_BLOCK, token = item / blocks * TOKENS_A_BLOCK;
    int64_t expert_count = min64(run->experts - expert, EXPERTS_A_BLOCK), token_count = min64(x->rows - token, TOKENS_A_BLOCK);
    float *sums = scratch, *room = sums + 8 * EXPERTS_A_BLOCK * TOKENS_A_BLOCK;
    room = rows_as_floats(experts, room, gate, expert, expert_count);
    rows_as_floats(tokens, room, x, token, token_count);
    mm_cpu->dots(run->logits + token * run->experts + expert, run->experts, tokens, token_count, experts, expert_count,
                 run->hidden, sums);
}

/* A number whose order among integers is the router's order of floats: -0 is 0, and any NaN is above all. */
static int32_t order_of(float value) {
    int32_t bits;
    if (isnan(value)) return INT32_MAX;
    value += 0.0f;
    memcpy(&bits, &value, sizeof bits);
    return bits < 0 ? bits ^ INT32_MAX : bits;
}

/* places [count] = indices of the largest values, in order; order [size] is scratch. The largest and its place are looked for one
 * after the other, since compilers make vectors of both loops. */
static void largest(int64_t *places, int64_t count, const float *values, int64_t size, int32_t *order) {
    for (int64_t i = 0; i < size; i++) order[i] = order_of(values[i]);
    for (int64_t k = 0; k < count; k++) {
        int32_t most = order[0];
        int64_t place = 0;
        for (int64_t i = 1; i < size; i++) most = order[i] > most ? order[i] : most;
        while (order[place] != most) place++;
        order[place] = INT32_MIN; /* below -inf */
        places[k] = place;
    }
}

static void softmax(float *out, const float *in, int64_t count) {
    float top = in[0], sum = 0;
    for (int64_t i = 1; i < count; i++) top = in[i] > top ? in[i] : top;
    for (int64_t i = 0; i < count; i++) sum += out[i] = expf(in[i] - top);
    for (int64_t i = 0; i < count; i++) out[i] /= sum;
}

/* DeepSeek-V3's group limit: a group's score is the sum of its two best; the other groups cannot be chosen. */
static void limit_groups(float *choice, const struct mm_router *router, int64_t experts, int32_t *order) {
    float scores[MM_MAX_EXPERTS];
    bool kept[MM_MAX_EXPERTS];
    int64_t places[MM_MAX_EXPERTS], size = experts / router->n_group;
    for (int64_t g = 0; g < router->n_group; g++) {
        const float *group = choice + g * size;
        int64_t best = size < 2 ? size : 2;
        largest(places, best, group, size, order);
        scores[g] = group[places[0]] + (best > 1 ? group[places[1]] : 0);
    }
    largest(places, router->topk_group, scores, router->n_group, order);
    for (int64_t g = 0; g < router->n_group; g++) kept[g] = false;
    for (int64_t i = 0; i < router->topk_group; i++) kept[places[i]] = true;
    for (int64_t e = 0; e < experts; e++)
        if (!kept[e / size]) choice[e] = -INFINITY;
}

static void route_token(int64_t token, void *scratch, void *context) {
    const struct router_run *run = context;
    const struct mm_router *router = run->router;
    const float *logits = run->logits + token * run->experts;
    float *weights = run->weights + token * router->top_k;
    int64_t *ids = run->ids + token * router->top_k, experts = run->experts;
    float scores[MM_MAX_EXPERTS], choice[MM_MAX_EXPERTS], correction[MM_MAX_EXPERTS], sum = 0;
    int32_t order[MM_MAX_EXPERTS];
    (void)scratch;
    for (int64_t e = 0; e < experts; e++) correction[e] = 0;
    if (router->correction.rows)
        mm_cpu->load(correction, router->correction.data, router->correction.type, router->correction.column_stride,
                     experts);
    switch (router->kind) {
    case MM_ROUTER_SOFTMAX_TOPK:
        softmax(scores, logits, experts);
        break;
    case MM_ROUTER_TOPK_SOFTMAX:
        for (int64_t e = 0; e < experts; e++) scores[e] = logits[e];
        break;
    case MM_ROUTER_SIGMOID_TOPK:
    default:
        for (int64_t e = 0; e < experts; e++) scores[e] = 1.0f / (1.0f + expf(-logits[e]));
        break;
    }
    for (int64_t e = 0; e < experts; e++) choice[e] = scores[e] + correction[e];
    if (router->n_group > 1) limit_groups(choice, router, experts, order);
    largest(ids, router->top_k, choice, experts, order);
    if (router->kind == MM_ROUTER_TOPK_SOFTMAX) {
        for (int64_t k = 0; k < router->top_k; k++) weights[k] = scores[ids[k]] + correction[ids[k]];
        softmax(weights, weights, router->top_k);
    } else {
        for (int64_t k = 0; k < router->top_k; k++) sum += weights[k] = scores[ids[k]];
        if (router->renormalize) /* 1e-20 as Hugging Face's DeepSeek-V3: all-zero sigmoids stay 0 */
            for (int64_t k = 0; k < router->top_k; k++) weights[k] /= sum + 1e-20f;
    }
    for (int64_t k = 0; k < router->top_k; k++) weights[k] *= router->scale;
}

bool mm_cpu_router(const struct mm_router *router, float *weights, int64_t *ids, float *logits) {
    struct router_run run = {router, weights, logits, ids, router->gate.rows, router->x.columns};
    int64_t blocks = (run.experts + EXPERTS_A_BLOCK - 1) / EXPERTS_A_BLOCK;
    int64_t token_blocks = (router->x.rows + TOKENS_A_BLOCK - 1) / TOKENS_A_BLOCK;
    size_t rows = (size_t)((EXPERTS_A_BLOCK + TOKENS_A_BLOCK) * run.hidden), sums = 8 * EXPERTS_A_BLOCK * TOKENS_A_BLOCK;
    return MM_PARALLEL(&run, {blocks * token_blocks, (rows + sums) * sizeof(float), logits_block},
                       {router->x.rows, 0, route_token});
}
