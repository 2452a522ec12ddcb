/* The list of router kinds. X(id, name, meaning). `correction` is added before the choice: to the scores (where it
 * does not enter the weights) or, for topk_softmax, to the logits (where it does).
 * Adding one: a line here, its formula in cpu/router.c, a line in tests/reference.py. */
#ifndef MM_SHARED_ROUTER_H
#define MM_SHARED_ROUTER_H

#define MM_ROUTERS(X)                                                                     \
    X(MM_ROUTER_SOFTMAX_TOPK, "softmax_topk", "softmax over all experts, then the top k") \
    X(MM_ROUTER_TOPK_SOFTMAX, "topk_softmax", "the top k logits, then softmax over them") \
    X(MM_ROUTER_SIGMOID_TOPK, "sigmoid_topk", "sigmoid of each logit, then the top k")

enum mm_router_kind {
#define X(id, name, meaning) id,
    MM_ROUTERS(X)
#undef X
    MM_ROUTER_COUNT
};

#endif
