/* The CPU backend's own header: tensor views, the kernel table that each SIMD level fills, the drivers that ops.c
 * calls. Knows nothing of torch: plain pointers, and a parallel-for that is handed in.
 * Shapes: x [rows, k]; a weight is k inputs x n outputs, both multiples of 128; "block" counts 128 columns. */
#ifndef MM_CPU_H
#define MM_CPU_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "shared/activation.h"
#include "shared/format.h"
#include "shared/router.h"

enum mm_float { MM_FLOAT32, MM_FLOAT16, MM_BFLOAT16 };

static inline size_t mm_float_bytes(enum mm_float type) { return type == MM_FLOAT32 ? 4 : 2; }

/* A strided tensor seen as rows of its last dimension. */
struct mm_rows {
    const void *data;
    enum mm_float type;
    int64_t rows, columns, column_stride; /* stride in elements */
    int lead_dims;                        /* the dimensions before the last */
    const int64_t *sizes, *strides;       /* of the lead dims */
};

/* One packed matrix. bias may be NULL. */
struct mm_weight {
    const uint8_t *tiles;            /* [k/16, n/16] tiles of MM_TILE_BYTES(rate2) */
    const uint16_t *suh, *svh, *bias; /* binary16: [k], [n], [n] */
    int64_t k, n;
    int rate2, codebook;
    const uint8_t *next; /* the tiles that the thread will probably read after a block of these, row strides alike: fetched meanwhile.
                            May be NULL */
};

/* Where a block of 128 columns begins. */
static inline const uint8_t *mm_weight_block(const struct mm_weight *weight, int64_t block) {
    return weight->tiles + block * (MM_HADAMARD / MM_TILE) * MM_TILE_BYTES(weight->rate2);
}

/* The matrices of all experts for one projection, as the op's arguments give them. */
struct mm_stack {
    const uint8_t *tiles;
    const int64_t *table; /* [experts, 3]: offset in int16 elements, rate2, codebook */
    const uint16_t *suh, *svh, *bias;
    int64_t k, n;
};

struct mm_weight mm_stack_weight(const struct mm_stack *stack, int64_t expert);

/* Rows handled by one call of `multiply`; a tile is decoded once for this many. */
#define MM_ROW_BLOCK 128
/* The longest form of a rotated row, per 128 inputs. */
#define MM_MAX_ROW_FLOATS (2 * MM_HADAMARD)
/* How far rows of `floats` lie apart: an odd number of cache lines, since rows are read side by side, a line of each, and where k is a power
 * of two they would all fall into a few sets of the cache. */
static inline int64_t mm_row_stride(int64_t floats) { return floats | 16; }
/* Floats of scratch that `multiply` and `multiply_transposed` need. */
#define MM_MULTIPLY_SCRATCH (MM_ROW_BLOCK * 8 * 16 + 16 * MM_TILE_WEIGHTS) /* sums, and a panel */

#define MM_FLOAT_INPUTS (1 << 24)

/* The kernels of one SIMD level. A rotated input row travels in a form of the level's own, row_floats(codebook) floats for
 * each 128 inputs: "tiled" (tiles.h), 4 groups of 4 values for each 16 inputs, in trellis order (rows 2q, 2q+1, 2q+8, 2q+9), each
 * written twice, since 8 trellis positions are 4 rows of 2 columns; "paired" (panel.h) or "stepped" (columns.h), each value once; or 16-bit integers
 * (int16.h). Rows lie `ld` floats apart. A gradient row travels as "spread", in 4n floats or fewer: where rows are tiled, for each
 * 16 columns 8 groups, column c four times and column c+8 four times. */
struct mm_kernels {
    const char *name;
    /* Of each codebook. 0: multiplies with the format's weights and float32 inputs. MM_FLOAT_INPUTS: with weights before their rounding to
     * binary16. Else inputs are rounded to integers of at most this in every block of 128, and weights are integers (int16.h, pairs.h). */
    int input_limits[MM_CODEBOOK_COUNT];
    void (*prepare)(void); /* builds the level's tables; called when the level becomes active, may run again */
    void (*load)(float *out, const void *in, enum mm_float type, int64_t stride, int64_t count);
    void (*store)(void *out, const float *in, enum mm_float type, int64_t count);
    int64_t (*row_floats)(int codebook);
    /* row = H(x * suh), x [k]; channels from `used` on are padding and count as 0 whatever x and suh hold. Its form may depend on how many
     * rows `multiply` will take with it. */
    void (*rotate_in)(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows);
    /* y [rows, 128] = rows, rotated for that many, times the 128 columns of `block` */
    void (*multiply)(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                     float *scratch);
    /* y [rows, 128] = H(y) * svh + bias, all for one block of 128 columns; also a gradient's last step, with suh */
    void (*rotate_out)(float *y, int64_t rows, const uint16_t *svh, const uint16_t *bias);
    /* spread [4n at most] = H(grad * svh), grad [n]; `used` as above */
    void (*rotate_grad)(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used);
    /* dx [rows, 128] = spread rows [rows, 4n] times the transpose of the 128 input rows of `block` */
    void (*multiply_transposed)(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch);
    /* out [128, 128] = one block of the weight; rotated: the codebook's values, untransformed */
    void (*dequantize)(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block, bool rotated);
    /* act [count] from gate and up [count] */
    void (*activate)(float *act, const float *gate, const float *up, int64_t count, enum mm_activation kind,
                     float alpha, float limit);
    float (*dot)(const float *a, const float *b, int64_t count);
    /* out [rows, columns], rows ld floats apart = the dot products of vectors a [rows] and b [columns] of `count` floats;
     * scratch [rows, columns, 8] */
    void (*dots)(float *out, int64_t ld, const float *const *a, int64_t rows, const float *const *b, int64_t columns,
                 int64_t count, float *scratch);
};

/* Every level, the default last; a getter is NULL-valued where the machine or the build lacks the level. */
const struct mm_kernels *mm_kernels_scalar(void);
const struct mm_kernels *mm_kernels_neon(void);
const struct mm_kernels *mm_kernels_avx2(void);
const struct mm_kernels *mm_kernels_neon_fp16(void);
const struct mm_kernels *mm_kernels_neon_int16(void);
const struct mm_kernels *mm_kernels_neon_int8(void);
const struct mm_kernels *mm_kernels_avx2_int16(void);
const struct mm_kernels *mm_kernels_avx_vnni_int16(void);
const struct mm_kernels *mm_kernels_avx_vnni_int8(void);
const struct mm_kernels *mm_kernels_avx512(void);
const struct mm_kernels *mm_kernels_avx512_fp16(void);
const struct mm_kernels *mm_kernels_avx512_int16(void);
const struct mm_kernels *mm_kernels_avx512_fp16_int16(void);
const struct mm_kernels *mm_kernels_avx512_int8(void);
const struct mm_kernels *mm_kernels_avx512_fp16_int8(void);
const struct mm_kernels *mm_kernels_amx_int8(void);
#define MM_CPU_LEVELS(X)                                                                      \
    X(scalar) X(neon) X(neon_fp16) X(avx2) X(avx512) X(avx512_fp16) X(neon_int16) X(neon_int8) X(avx2_int16) X(avx_vnni_int16) \
    X(avx_vnni_int8) X(avx512_int16) X(avx512_fp16_int16) X(avx512_int8) X(avx512_fp16_int8) X(amx_int8)

extern const struct mm_kernels *mm_cpu; /* the active level; set once at import, and by tests */
#define MM_ONE_MORE(name) +1
enum { MM_MAX_CPU_LEVELS = 0 MM_CPU_LEVELS(MM_ONE_MORE) };
int mm_cpu_levels(const struct mm_kernels **levels); /* fills what this machine runs; returns the count */

/* parallel.c: phases one after the other, in one parallel region; the items 0..count-1 of a phase are each done by one thread, pulled in
 * order, once all of the phase before are done. Each thread has scratch_bytes of its own, 64-byte aligned. False: out of memory,
 * nothing ran. Results must not depend on which thread runs an item. At most 8 phases. */
typedef void (*mm_item)(int64_t item, void *scratch, void *context);
struct mm_phase {
    int64_t count;
    size_t scratch_bytes;
    mm_item body;
};
bool mm_parallel(const struct mm_phase *phases, int count, void *context);
#define MM_PARALLEL(context, ...) \
    mm_parallel((const struct mm_phase[]){__VA_ARGS__}, \
                (int)(sizeof((const struct mm_phase[]){__VA_ARGS__}) / sizeof(struct mm_phase)), context)
struct mm_threads {
    int (*count)(void);
    void (*run)(int64_t begin, int64_t end, int64_t grain, void (*body)(int64_t, int64_t, void *), void *context);
};
extern struct mm_threads mm_threads;

void *mm_alloc(size_t bytes); /* 64-byte aligned, freed by mm_free; NULL when out of memory */
void mm_free(void *memory);
const void *mm_rows_at(const struct mm_rows *rows, int64_t row);

/* The drivers. Each returns false when it ran out of memory; all else was checked by the caller. */
bool mm_cpu_linear(const struct mm_rows *x, const struct mm_weight *weight, int64_t out_features, void *y);
bool mm_cpu_linear_backward(const struct mm_rows *grad, const struct mm_weight *weight, int64_t in_features, void *dx);
bool mm_cpu_dequantize(const struct mm_weight *weight, bool rotated, int64_t in_features, int64_t out_features,
                       float *out);

struct mm_moe {
    struct mm_rows x;       /* [tokens, hidden] */
    struct mm_rows weights; /* [tokens, top_k] */
    const int32_t *ids;     /* [tokens, top_k], in range or MM_NO_EXPERT */
    struct mm_stack gate, up, down;
    int64_t experts, intermediate;
    enum mm_activation activation;
    float alpha, limit;
};
bool mm_cpu_moe(const struct mm_moe *moe, void *y);
bool mm_cpu_moe_backward(const struct mm_moe *moe, const struct mm_rows *grad, void *dx, void *dweights);

struct mm_router {
    struct mm_rows x, gate;       /* [tokens, hidden], [experts, hidden] */
    struct mm_rows correction;    /* [1, experts], or no rows */
    int64_t top_k, n_group, topk_group;
    enum mm_router_kind kind;
    bool renormalize;
    float scale;
};
bool mm_cpu_router(const struct mm_router *router, float *weights, int64_t *ids, float *logits);

#endif
