/* The router: gate product, scores, and the top k, with its weights. Kinds are listed in shared/router.h.
 * The order is total: higher score first, a NaN above all numbers, equal scores by index; so ids are always distinct
 * and in range, whatever x holds. */
#include <math.h>

#include "cpu/cpu.h"

#define EXPERTS_A_BLOCK 16
#define TOKENS_A_BLOCK 8

struct router_run {
    const struct mm_router *router;
    float *weights, *logits;
    int64_t *ids;
    int64_t experts, hidden;
};

static void logits_block(int64_t item, void *scratch, void *context) {
    const struct router_run *run = context;
    const struct mm_rows *x = &run->router->x, *gate = &run->router->gate;
    int64_t blocks = (run->experts + EXPERTS_A_BLOCK - 1) / EXPERTS_A_BLOCK;
    int64_t expert = item % blocks * EXPERTS_A_BLOCK, token = item / blocks * TOKENS_A_BLOCK;
    int64_t last_expert = expert + EXPERTS_A_BLOCK < run->experts ? expert + EXPERTS_A_BLOCK : run->experts;
    int64_t last_token = token + TOKENS_A_BLOCK < x->rows ? token + TOKENS_A_BLOCK : x->rows;
    float *gates = scratch, *row = gates + EXPERTS_A_BLOCK * run->hidden;
    for (int64_t e = expert; e < last_expert; e++)
        mm_cpu->load(gates + (e - expert) * run->hidden, mm_rows_at(gate, e), gate->type, gate->column_stride,
                     run->hidden);
    for (int64_t t = token; t < last_token; t++) {
        mm_cpu->load(row, mm_rows_at(x, t), x->type, x->column_stride, run->hidden);
        for (int64_t e = expert; e < last_expert; e++)
            run->logits[t * run->experts + e] = mm_cpu->dot(row, gates + (e - expert) * run->hidden, run->hidden);
    }
}

/* Whether a comes before b, given that a's index is higher (so equal is no). */
static bool beats(float a, float b) { return a > b || (isnan(a) && !isnan(b)); }

/* places [count] = indices of the largest values, in order; taken [size] is scratch */
static void largest(int64_t *places, int64_t count, const float *values, int64_t size, bool *taken) {
    for (int64_t i = 0; i < size; i++) taken[i] = false;
    for (int64_t k = 0; k < count; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < size; i++)
            if (!taken[i] && (best < 0 || beats(values[i], values[best]))) best = i;
        taken[best] = true;
        places[k] = best;
    }
}

static void softmax(float *out, const float *in, int64_t count) {
    float top = in[0], sum = 0;
    for (int64_t i = 1; i < count; i++) top = in[i] > top ? in[i] : top;
    for (int64_t i = 0; i < count; i++) sum += out[i] = expf(in[i] - top);
    for (int64_t i = 0; i < count; i++) out[i] /= sum;
}

/* DeepSeek-V3's group limit: a group's score is the sum of its two best; the other groups cannot be chosen. */
static void limit_groups(float *choice, const struct mm_router *router, int64_t experts, bool *taken) {
    float scores[MM_MAX_EXPERTS];
    bool kept[MM_MAX_EXPERTS];
    int64_t places[MM_MAX_EXPERTS], size = experts / router->n_group;
    for (int64_t g = 0; g < router->n_group; g++) {
        const float *group = choice + g * size;
        int64_t best = size < 2 ? size : 2;
        largest(places, best, group, size, taken);
        scores[g] = group[places[0]] + (best > 1 ? group[places[1]] : 0);
    }
    largest(places, router->topk_group, scores, router->n_group, taken);
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
    bool taken[MM_MAX_EXPERTS];
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
    if (router->n_group > 1) limit_groups(choice, router, experts, taken);
    largest(ids, router->top_k, choice, experts, taken);
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
    return mm_parallel(blocks * token_blocks, (size_t)((EXPERTS_A_BLOCK + 1) * run.hidden) * sizeof(float),
                       logits_block, &run) &&
           mm_parallel(router->x.rows, 0, route_token, &run);
}
