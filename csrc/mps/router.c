/* Encoder of the router: one dispatch, a threadgroup a token. */
#include <stdio.h>

#include "mps/mps.h"

const char *mm_mps_router(const struct mm_mps_router *router) {
    struct mm_dispatch dispatch = {0};
    const char *message = NULL;
    char prefix[256];
    if (!router->tokens) return NULL;
    snprintf(prefix, sizeof prefix,
             "#define MM_T %s\n#define MM_G %s\n#define MM_C %s\n#define MM_HAS_CORRECTION %s\n#define MM_ROUTER %d\n"
             "#define MM_RENORMALIZE %s\n",
             mm_metal_type(router->x_dtype), mm_metal_type(router->gate_dtype),
             mm_metal_type(router->correction ? router->correction_dtype : router->gate_dtype),
             router->correction ? "true" : "false", (int)router->kind, router->renormalize ? "true" : "false");
    dispatch.kernel = mm_mps_kernel(MM_METAL_router, prefix, "route", &message);
    if (!dispatch.kernel) return message;
    mm_bind_tensor(&dispatch, ROUTER_X, router->x);
    mm_bind_tensor(&dispatch, ROUTER_GATE, router->gate);
    mm_bind_tensor(&dispatch, ROUTER_CORRECTION, router->correction ? router->correction : router->gate);
    mm_bind_tensor(&dispatch, ROUTER_WEIGHTS, router->weights);
    mm_bind_tensor(&dispatch, ROUTER_IDS, router->ids);
    mm_bind_tensor(&dispatch, ROUTER_LOGITS, router->logits);
    mm_bind_int(&dispatch, ROUTER_HIDDEN, router->hidden);
    mm_bind_int(&dispatch, ROUTER_EXPERTS, router->experts);
    mm_bind_int(&dispatch, ROUTER_TOP_K, router->top_k);
    mm_bind_float(&dispatch, ROUTER_SCALE, router->scale);
    mm_bind_int(&dispatch, ROUTER_N_GROUP, router->n_group);
    mm_bind_int(&dispatch, ROUTER_TOPK_GROUP, router->topk_group);
    mm_grid(&dispatch, router->tokens, 1, MM_ROUTER_THREADS);
    return mm_mps_run(&dispatch, 1);
}
