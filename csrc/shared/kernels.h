/* The buffer slots of every Metal kernel, said once: the encoders bind them, the kernels declare them.
 * Macros, since [[buffer(n)]] wants a literal. Slots hold a tensor's memory, or an integer of 8 bytes (INT) or a float (FLOAT).
 * Every torch with an MPS shim can bind 8 bytes; a float is the first 4 of them where torch cannot bind fewer. */
#ifndef MM_SHARED_KERNELS_H
#define MM_SHARED_KERNELS_H

/* One packed projection: trellis, table, suh, svh, bias in five neighbouring slots. */
#define STACK_TRELLIS 0
#define STACK_TABLE 1
#define STACK_SUH 2
#define STACK_SVH 3
#define STACK_BIAS 4
#define STACK_SLOTS 5

/* trellis_linear */
#define LINEAR_X 0
#define LINEAR_TRELLIS 1
#define LINEAR_SUH 2
#define LINEAR_SVH 3
#define LINEAR_BIAS 4
#define LINEAR_Y 5
#define LINEAR_ROWS 6         /* INT */
#define LINEAR_IN 7           /* INT: in_features */
#define LINEAR_OUT 8          /* INT: out_features */

/* moe_trellis_swiglu: gate and up (decode and prefill) */
#define MOE_X 0
#define MOE_IDS 1
#define MOE_ACT 2             /* [pairs, padded intermediate] float, rotated for down */
#define MOE_GATE 3            /* 5 slots */
#define MOE_UP 8              /* 5 slots */
#define MOE_DOWN_SUH 13
#define MOE_TOKENS 14         /* INT */
#define MOE_TOP_K 15          /* INT */
#define MOE_HIDDEN 16         /* INT */
#define MOE_INTERMEDIATE 17   /* INT */
#define MOE_ALPHA 18          /* FLOAT */
#define MOE_LIMIT 19          /* FLOAT */
#define MOE_EXPERTS 22        /* INT */
#define MOE_FIRST 23          /* INT, prefill: the chunk's first token */
#define MOE_ORDER 20          /* prefill: pairs sorted by expert */
#define MOE_TILES 21          /* prefill: expert, first place and rows of each tile */

/* moe_trellis_swiglu: down */
#define DOWN_ACT 0
#define DOWN_IDS 1
#define DOWN_WEIGHTS 2
#define DOWN_Y 3              /* decode: the result; prefill: [pairs, hidden] float */
#define DOWN_STACK 4          /* 5 slots */
#define DOWN_TOKENS 9         /* INT */
#define DOWN_TOP_K 10         /* INT */
#define DOWN_HIDDEN 11        /* INT */
#define DOWN_INTERMEDIATE 12  /* INT */
#define DOWN_ORDER 13         /* prefill */
#define DOWN_TILES 14         /* prefill */
#define DOWN_EXPERTS 15       /* INT */
#define DOWN_FIRST 16         /* INT, prefill: the chunk's first token */

/* prefill: sorting pairs by expert */
#define SORT_IDS 0
#define SORT_ORDER 1
#define SORT_TILES 2
#define SORT_PAIRS 3          /* INT */
#define SORT_EXPERTS 4        /* INT */
#define SORT_MOST_TILES 5     /* INT: room in SORT_TILES */
#define SORT_FIRST 6          /* INT: the chunk's first pair */

/* prefill: sum over a token's experts */
#define COMBINE_PARTS 0
#define COMBINE_Y 1
#define COMBINE_IDS 2
#define COMBINE_TOP_K 3       /* INT */
#define COMBINE_HIDDEN 4      /* INT */
#define COMBINE_EXPERTS 5     /* INT */
#define COMBINE_FIRST 6       /* INT: the chunk's first token */

/* router */
#define ROUTER_X 0
#define ROUTER_GATE 1
#define ROUTER_CORRECTION 2
#define ROUTER_WEIGHTS 3
#define ROUTER_IDS 4
#define ROUTER_LOGITS 5
#define ROUTER_HIDDEN 6       /* INT */
#define ROUTER_EXPERTS 7      /* INT */
#define ROUTER_TOP_K 8        /* INT */
#define ROUTER_SCALE 9        /* FLOAT */
#define ROUTER_N_GROUP 10     /* INT */
#define ROUTER_TOPK_GROUP 11  /* INT */

/* dequantize */
#define DEQUANTIZE_TRELLIS 0
#define DEQUANTIZE_SUH 1
#define DEQUANTIZE_SVH 2
#define DEQUANTIZE_OUT 3
#define DEQUANTIZE_SCRATCH 4
#define DEQUANTIZE_IN 5       /* INT: in_features */
#define DEQUANTIZE_COLUMNS 6  /* INT: out_features */
#define DEQUANTIZE_K 7        /* INT */
#define DEQUANTIZE_N 8        /* INT */

/* Sizes that host and kernel must agree on. */
#define MM_SIMD 32
#define MM_DECODE_ROWS 8      /* tokens of one call that share a decoded tile; more is prefill */
#define MM_DECODE_SPLITS 4    /* simdgroups that share a column tile, each with every 4th block of inputs */
#define MM_DECODE_THREADS 1024
#define MM_PREFILL_ROWS 32
#define MM_PREFILL_THREADS 256
#define MM_SORT_THREADS 512
#define MM_ROUTER_THREADS 256
#define MM_DEQUANTIZE_THREADS 256
#define MM_TILE_ENTRY 3       /* ints a tile takes in the list */

#endif
