/* The kernels of a SIMD level that do not depend on how it decodes: Hadamards, conversions, activations, and the level's table.
 * In C over 8-wide vectors, Hadamards over the widest. Included once by each level's file, which first defines
 *   LEVEL                       the level's name, for the table
 *   load_half, store_half       binary16 rows
 *   wide_of_halves(in)          a vector of them (vector.h)
 * and then includes how it reads weights, with prepare, and the products, which complete the functions declared here: tiles.h or panel.h. */
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/half.h"

#define BLOCK_TILES (MM_HADAMARD / MM_TILE)

static void prepare(void); /* builds the level's tables */
static int64_t row_floats(int codebook);
static void rotate_in(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows);
static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used);
static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                     float *scratch);
static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch);
/* out [128, 128]: one block of the codebook's values */
static void decode_block(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block);

/* ---- Hadamard ---- */

#define WIDES (MM_HADAMARD / WIDE_LANES)

/* A bit of the index of whole vectors; half, that bit, is a constant when inlined. */
INLINE void butterflies(wide *v, int half) {
    UNROLL(8) for (int pair = 0; pair < WIDES / 2; pair++) {
        int i = pair / half * 2 * half + pair % half;
        wide a = v[i], b = v[i + half];
        v[i] = a + b;
        v[i + half] = a - b;
    }
}

/* v [128] times the natural-order (Sylvester) Hadamard matrix over sqrt(128). The lower bits of the index are butterflies within a vector:
 * a lane's partner plus or minus the lane. The scale comes first: only products with a sign are added, so that it makes no difference
 * which of them a compiler fuses with an addition. */
INLINE void hadamard128(wide *v) {
#define SIGN(i, half) ((i) & (half) ? -1 : 1)
#define BUTTERFLY(half) x = PARTNERS(x, half) + x * (wide){BY_LANE(SIGN, half)}
    UNROLL(16) for (int i = 0; i < WIDES; i++) {
        wide x = v[i] * MM_HADAMARD_SCALE;
        BUTTERFLY(1);
        BUTTERFLY(2);
        BUTTERFLY(4);
        if (WIDE_LANES > 8) BUTTERFLY(WIDE_LANES / 2);
        v[i] = x;
    }
#undef BUTTERFLY
#undef SIGN
    butterflies(v, 1);
    butterflies(v, 2);
    butterflies(v, 4);
    if (WIDES > 8) butterflies(v, WIDES / 2);
}

/* ---- weights ---- */

/* 8 tiles under each other, or the first of such columns side by side. */
struct column {
    const uint8_t *tile;
    int64_t stride; /* bytes from a tile to the one under it */
    int64_t ahead;  /* bytes from a tile to the one to ask for beside the work on it, one column on in the walk */
};

INLINE const uint8_t *tile_at(const struct mm_weight *weight, int64_t block, int64_t b, int j) {
    return mm_weight_block(weight, block) + b * BLOCK_TILES * (weight->n / MM_TILE) * MM_TILE_BYTES(weight->rate2) + j * MM_TILE_BYTES(weight->rate2);
}

/* Tile column j of a block, inputs 128 b on, in a walk that takes `together` columns from j on down all inputs before the next ones. */
INLINE struct column column_of(const struct mm_weight *weight, int64_t block, int64_t b, int j, int together) {
    const uint8_t *tile = tile_at(weight, block, b, j), *then = weight->next ? weight->next : tile;
    if (b + 1 < weight->k / MM_HADAMARD)
        then = tile_at(weight, block, b + 1, j);
    else if (j + together < BLOCK_TILES)
        then = tile_at(weight, block, 0, j + together);
    return (struct column){tile, weight->n / MM_TILE * MM_TILE_BYTES(weight->rate2), (int64_t)((uintptr_t)then - (uintptr_t)tile)};
}

/* The processor's own prefetching does not help here, since the stride crosses a page at nearly every step; asking for a whole block at
 * once, or for the next columns, one walk along k ahead, is slower by a few percent (Sapphire Rapids). */
INLINE void prefetch_tiles(const uint8_t *tile, int64_t ahead, int bytes) {
    uintptr_t wanted = (uintptr_t)tile + (uintptr_t)ahead; /* of another matrix, maybe */
    for (int byte = 0; byte < bytes; byte += 64) __builtin_prefetch((const void *)(wanted + (uintptr_t)byte));
}

/* ---- rows in and out ---- */

static void load(float *out, const void *in, enum mm_float type, int64_t stride, int64_t count) {
    if (type == MM_FLOAT32) {
        const float *values = in;
        if (stride == 1)
            memcpy(out, values, (size_t)count * sizeof *out);
        else
            for (int64_t i = 0; i < count; i++) out[i] = values[i * stride];
    } else {
        const uint16_t *values = in;
        if (type == MM_FLOAT16 && stride == 1)
            load_half(out, values, count);
        else if (type == MM_FLOAT16)
            for (int64_t i = 0; i < count; i++) out[i] = mm_float_of_half(values[i * stride]);
        else
            for (int64_t i = 0; i < count; i++) out[i] = mm_float_of_bfloat16(values[i * stride]);
    }
}

static void store(void *out, const float *in, enum mm_float type, int64_t count) {
    uint16_t *values = out;
    if (type == MM_FLOAT32)
        memcpy(out, in, (size_t)count * sizeof *in);
    else if (type == MM_FLOAT16)
        store_half(values, in, count);
    else
        for (int64_t i = 0; i < count; i++) values[i] = mm_bfloat16_of_float(in[i]);
}

/* out [128] = H(in * scale), both sides in the order of the channels; the channels from `used` on are 0 */
INLINE void scale_rotate(wide *out, const float *in, const uint16_t *scale, int64_t used) {
    for (int i = 0; i < WIDES; i++) out[i] = ((const uwide *)(const void *)in)[i] * wide_of_halves(scale + i * WIDE_LANES);
    for (int64_t i = used; i < MM_HADAMARD; i++) ((float *)out)[i] = 0;
    hadamard128(out);
}

static void rotate_out(float *y, int64_t rows, const uint16_t *svh, const uint16_t *bias) {
    wide scale[WIDES], shift[WIDES] = {{0}};
    for (int i = 0; i < WIDES; i++) scale[i] = wide_of_halves(svh + i * WIDE_LANES);
    for (int i = 0; bias && i < WIDES; i++) shift[i] = wide_of_halves(bias + i * WIDE_LANES);
    for (int64_t r = 0; r < rows; r++, y += MM_HADAMARD) {
        wide rotated[WIDES];
        memcpy(rotated, y, sizeof rotated);
        hadamard128(rotated);
        for (int i = 0; i < WIDES; i++) ((uwide *)(void *)y)[i] = rotated[i] * scale[i] + shift[i];
    }
}

/* ---- dequantize ---- */

static void dequantize(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block, bool rotated) {
    decode_block(out, weight, k_block, n_block);
    if (rotated) return;
    float svh[MM_HADAMARD], suh[MM_HADAMARD];
    load_half(svh, weight->svh + n_block * MM_HADAMARD, MM_HADAMARD);
    load_half(suh, weight->suh + k_block * MM_HADAMARD, MM_HADAMARD);
    for (int row = 0; row < MM_HADAMARD; row++) hadamard128((wide *)(void *)(out + row * MM_HADAMARD));
    for (int half = 1; half < MM_HADAMARD; half *= 2) /* the other side: butterflies between rows */
        for (int i = 0; i < MM_HADAMARD; i += 2 * half)
            for (int row = i; row < i + half; row++) {
                float *a = out + row * MM_HADAMARD, *b = out + (row + half) * MM_HADAMARD;
                for (int column = 0; column < MM_HADAMARD; column++) {
                    float u = a[column], v = b[column];
                    a[column] = u + v;
                    b[column] = u - v;
                }
            }
    for (int row = 0; row < MM_HADAMARD; row++)
        for (int column = 0; column < MM_HADAMARD; column++)
            out[row * MM_HADAMARD + column] *= MM_HADAMARD_SCALE * suh[row] * svh[column];
}

/* ---- activations ---- */

/* mask ? a : b, lane by lane; a NaN compares false, so it is kept where it stands in b */
INLINE vec8 choose(ivec8 mask, vec8 a, vec8 b) { return (vec8)((mask & (ivec8)a) | (~mask & (ivec8)b)); }

/* e^x to 2 ulp for |x| <= 87: x = n ln 2 + r, a degree-6 Taylor-Chebyshev polynomial in r, 2^n through the exponent
 * bits (Cephes' expf; ln 2 in two parts). Above 88.4 it is inf, below -87.3 it stays at 1.2e-38, NaN stays NaN. */
INLINE vec8 exponential(vec8 x) {
    const vec8 zero = {0}, high = zero + 89.0f, low = zero - 87.33654f;
    x = choose(x > high, high, x);
    x = choose(x < low, low, x);
    const float shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer in the low bits */
    vec8 shifted = x * 1.44269504f + shifter, n = shifted - shifter;
    vec8 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vec8 p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vec8)(((ivec8)shifted << 23) + (127 << 23));
}

static void activate(float *act, const float *gate, const float *up, int64_t count, enum mm_activation kind,
                     float alpha, float limit) {
    for (int64_t i = 0; i < count; i += 8) {
        vec8 g, u, a;
        const vec8 zero = {0};
        memcpy(&g, gate + i, sizeof g);
        memcpy(&u, up + i, sizeof u);
        switch (kind) {
        case MM_ACTIVATION_SILU:
            a = g / (1.0f + exponential(-g)) * u;
            break;
        case MM_ACTIVATION_GELU:
            for (int j = 0; j < 8; j++) a[j] = 0.5f * g[j] * (1.0f + erff(g[j] * 0.70710678f)) * u[j];
            break;
        case MM_ACTIVATION_GELU_TANH: { /* (1 + tanh z) / 2 = sigmoid(2 z), z = sqrt(2/pi) (g + 0.044715 g^3) */
            vec8 z = 1.5957691216f * (g + 0.044715f * g * g * g);
            a = g / (1.0f + exponential(-z)) * u;
            break;
        }
        case MM_ACTIVATION_SWIGLU_OAI: {
            vec8 top = zero + limit, bottom = zero - limit;
            g = choose(g > top, top, g);
            u = choose(u > top, top, u);
            u = choose(u < bottom, bottom, u);
            a = g / (1.0f + exponential(-(alpha * g))) * (u + 1.0f);
            break;
        }
        default:
            a = zero;
        }
        memcpy(act + i, &a, sizeof a);
    }
}

/* ---- dense ---- */

static float dot(const float *a, const float *b, int64_t count) {
    vec8 sum[4] = {{0}, {0}, {0}, {0}};
    int64_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 4; j++)
            sum[j] += *(const uvec8 *)(const void *)(a + i + 8 * j) * *(const uvec8 *)(const void *)(b + i + 8 * j);
    float rest = 0;
    for (; i < count; i++) rest += a[i] * b[i];
    vec8 v = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])) + rest;
}

/* sums [rows, columns] (ld vectors apart) += a [rows] . b [columns], 8 partial sums for each; rows and columns are constants when
 * inlined. 3 x 4 sums, 3 vectors of a and one of b are AVX2's 16 registers. */
INLINE void dots_block(vec8 *sums, int64_t ld, const float *const *a, int rows, const float *const *b, int columns,
                       int64_t first, int64_t last) {
    vec8 sum[3][4];
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sum[r][c] = sums[r * ld + c];
    for (int64_t i = first; i < last; i += 8) {
        vec8 left[3];
        for (int r = 0; r < rows; r++) left[r] = *(const uvec8 *)(const void *)(a[r] + i);
        for (int c = 0; c < columns; c++) {
            vec8 right = *(const uvec8 *)(const void *)(b[c] + i);
            for (int r = 0; r < rows; r++) sum[r][c] += left[r] * right;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int c = 0; c < columns; c++) sums[r * ld + c] = sum[r][c];
}

INLINE void dots_rows(vec8 *sums, int64_t ld, const float *const *a, int rows, const float *const *b, int64_t columns,
                      int64_t first, int64_t last) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4) dots_block(sums + c, ld, a, rows, b + c, 4, first, last);
    for (; c < columns; c++) dots_block(sums + c, ld, a, rows, b + c, 1, first, last);
}

#define DOTS_DEPTH 512 /* 2 KB of a vector: those of a block stay in the first cache while others pass */

/* Each sum has one order of additions, whatever is around it. */
static void dots(float *out, int64_t ld, const float *const *a, int64_t rows, const float *const *b, int64_t columns,
                 int64_t count, float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch;
    int64_t whole = count / 8 * 8;
    memset(sums, 0, (size_t)(rows * columns) * sizeof *sums);
    for (int64_t first = 0; first < whole; first += DOTS_DEPTH) {
        int64_t last = first + DOTS_DEPTH < whole ? first + DOTS_DEPTH : whole, r = 0;
        for (; r + 3 <= rows; r += 3) dots_rows(sums + r * columns, columns, a + r, 3, b, columns, first, last);
        if (rows - r == 2) dots_rows(sums + r * columns, columns, a + r, 2, b, columns, first, last);
        if (rows - r == 1) dots_rows(sums + r * columns, columns, a + r, 1, b, columns, first, last);
    }
    for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) {
            float rest = 0;
            for (int64_t i = whole; i < count; i++) rest += a[r][i] * b[c][i];
            vec8 v = sums[r * columns + c];
            out[r * ld + c] = ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])) + rest;
        }
}

/* What every table of a level's file has in common. */
#define SHARED_KERNELS                                                                                         \
    .load = load, .store = store, .rotate_out = rotate_out, .rotate_grad = rotate_grad,                        \
    .multiply_transposed = multiply_transposed, .dequantize = dequantize, .activate = activate, .dot = dot, .dots = dots

static const struct mm_kernels kernels __attribute__((unused)) = { /* where a file is there for the levels of int16.h alone */
    .name = LEVEL,
    .prepare = prepare,
    .row_floats = row_floats,
    .rotate_in = rotate_in,
    .multiply = multiply,
    SHARED_KERNELS,
};
