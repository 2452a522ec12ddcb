/* The kernels of a SIMD level, in C over 8-wide vectors. Included once by each level's file, which first defines
 *   LEVEL                       the level's name, for the table; without it there is no table
 *   tile_reader                 what decoding one tile needs
 *   tile_open(rate2, tile)      -> tile_reader
 *   tile_decode(&reader, group, codebook) -> vec8: trellis positions 8 group .. 8 group + 7
 *   load_half, store_half       binary16 rows
 * The order of additions is the same for every batch size, so a row's result does not depend on its neighbours. */
#include <math.h>
#include <string.h>

#include "cpu/cpu.h"
#include "cpu/half.h"

#define GROUPS (MM_TILE_WEIGHTS / 8)     /* vectors in a tile: 8 columns c x 4 row groups q */
#define BLOCK_TILES (MM_HADAMARD / MM_TILE)
#define PANEL_TILES 16 /* tiles decoded ahead for many rows: 16 KB, half of a small L1 */
#define FUSED_ROWS 4   /* up to this many rows, weights go from the decoder straight into the sums */

/* ---- Hadamard ---- */

static const float hadamard8[8][8] = {
    {1, 1, 1, 1, 1, 1, 1, 1},     {1, -1, 1, -1, 1, -1, 1, -1}, {1, 1, -1, -1, 1, 1, -1, -1},
    {1, -1, -1, 1, 1, -1, -1, 1}, {1, 1, 1, 1, -1, -1, -1, -1}, {1, -1, 1, -1, -1, 1, -1, 1},
    {1, 1, -1, -1, -1, -1, 1, 1}, {1, -1, -1, 1, -1, 1, 1, -1},
};

/* The upper bits of the index: butterflies between whole vectors. */
INLINE void butterflies(vec8 *v, int count) {
    for (int half = 1; half < count; half *= 2)
        for (int i = 0; i < count; i += 2 * half)
            for (int j = i; j < i + half; j++) {
                vec8 a = v[j], b = v[j + half];
                v[j] = a + b;
                v[j + half] = a - b;
            }
}

/* v [128] times the natural-order (Sylvester) Hadamard matrix over sqrt(128). The lower 3 bits of the index are a
 * product with an 8 x 8 sign matrix: broadcasts and adds, which need no shuffle. The scale comes first: only products with a sign
 * are added, so that it makes no difference which of them a compiler fuses with an addition. */
INLINE void hadamard128(vec8 *v) {
    const vec8 *signs = (const vec8 *)(const void *)hadamard8;
    for (int i = 0; i < 16; i++) v[i] *= MM_HADAMARD_SCALE;
    for (int i = 0; i < 16; i++) {
        const float *s = (const float *)&v[i];
        vec8 sum = signs[0] * s[0];
        for (int j = 1; j < 8; j++) sum += signs[j] * s[j];
        v[i] = sum;
    }
    butterflies(v, 16);
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
INLINE void scale_rotate(vec8 *out, const float *in, const uint16_t *scale, int64_t used) {
    float factors[MM_HADAMARD];
    load_half(factors, scale, MM_HADAMARD);
    for (int i = 0; i < MM_HADAMARD; i++) ((float *)out)[i] = in[i] * factors[i];
    for (int64_t i = used; i < MM_HADAMARD; i++) ((float *)out)[i] = 0;
    hadamard128(out);
}

static int64_t row_floats(int codebook) {
    (void)codebook;
    return 2 * MM_HADAMARD;
}

static void rotate_in(float *tiled, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook) {
    (void)codebook;
    for (int64_t i = 0; i < k; i += MM_HADAMARD) {
        vec8 rotated[16];
        scale_rotate(rotated, x + i, suh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int q = 0; q < 4; q++, tiled += 8) {
                tiled[0] = tiled[4] = h[2 * q];
                tiled[1] = tiled[5] = h[2 * q + 1];
                tiled[2] = tiled[6] = h[2 * q + 8];
                tiled[3] = tiled[7] = h[2 * q + 9];
            }
    }
}

static void rotate_grad(float *spread, const float *grad, const uint16_t *svh, int64_t n, int64_t used) {
    for (int64_t i = 0; i < n; i += MM_HADAMARD) {
        vec8 rotated[16];
        scale_rotate(rotated, grad + i, svh + i, used - i);
        const float *h = (const float *)rotated;
        for (int tile = 0; tile < BLOCK_TILES; tile++, h += MM_TILE)
            for (int c = 0; c < 8; c++, spread += 8) {
                spread[0] = spread[1] = spread[2] = spread[3] = h[c];
                spread[4] = spread[5] = spread[6] = spread[7] = h[c + 8];
            }
    }
}

static void rotate_out(float *y, int64_t rows, const uint16_t *svh, const uint16_t *bias) {
    float scale[MM_HADAMARD], shift[MM_HADAMARD] = {0};
    load_half(scale, svh, MM_HADAMARD);
    if (bias) load_half(shift, bias, MM_HADAMARD);
    for (int64_t r = 0; r < rows; r++, y += MM_HADAMARD) {
        vec8 rotated[16];
        memcpy(rotated, y, sizeof rotated);
        hadamard128(rotated);
        const float *h = (const float *)rotated;
        for (int i = 0; i < MM_HADAMARD; i++) y[i] = h[i] * scale[i] + shift[i];
    }
}

/* ---- products ---- */

/* Few rows: every tile of the block's column is decoded into registers and multiplied at once.
 * sums [rows, 8 tiles, 8 columns] vectors; tiles of one tile row lie side by side, so memory is read in order. */
INLINE void multiply_fused(vec8 *sums, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                           int rows, int codebook) {
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    const uint8_t *tiles = weight->tiles + block * BLOCK_TILES * tile_bytes;
    for (int64_t kt = 0; kt < weight->k / MM_TILE; kt++, tiles += row_bytes) {
        for (int j = 0; j < BLOCK_TILES; j++) {
            tile_reader reader = tile_open(weight->rate2, tiles + j * tile_bytes);
            for (int c = 0; c < 8; c++) {
                vec8 w[4];
                for (int q = 0; q < 4; q++) w[q] = tile_decode(&reader, 4 * c + q, codebook);
                for (int r = 0; r < rows; r++) {
                    const vec8 *x = (const vec8 *)(const void *)(tiled + r * ld + kt * 32);
                    vec8 sum = sums[(r * BLOCK_TILES + j) * 8 + c];
                    for (int q = 0; q < 4; q++) sum += w[q] * x[q];
                    sums[(r * BLOCK_TILES + j) * 8 + c] = sum;
                }
            }
        }
    }
}

/* sums [rows, 8 columns] += tiled rows times a decoded panel [tiles, 8 columns, 4]; rows is a constant when inlined */
INLINE void multiply_panel_rows(vec8 *sums, const vec8 *panel, int64_t tiles, const float *tiled, int64_t ld, int rows) {
    for (int c = 0; c < 8; c += 2) {
        vec8 sum[FUSED_ROWS][2];
        for (int r = 0; r < rows; r++) sum[r][0] = sums[r * 8 + c], sum[r][1] = sums[r * 8 + c + 1];
        for (int64_t t = 0; t < tiles; t++)
            for (int q = 0; q < 4; q++) {
                vec8 w0 = panel[(t * 8 + c) * 4 + q], w1 = panel[(t * 8 + c + 1) * 4 + q];
                for (int r = 0; r < rows; r++) {
                    vec8 x = ((const vec8 *)(const void *)(tiled + r * ld))[t * 4 + q];
                    sum[r][0] += w0 * x;
                    sum[r][1] += w1 * x;
                }
            }
        for (int r = 0; r < rows; r++) sums[r * 8 + c] = sum[r][0], sums[r * 8 + c + 1] = sum[r][1];
    }
}

static void multiply_panel(vec8 *sums, const vec8 *panel, int64_t tiles, const float *tiled, int64_t ld, int64_t rows) {
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 4);
    if (rows - r == 3) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 3);
    if (rows - r == 2) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 2);
    if (rows - r == 1) multiply_panel_rows(sums + r * 8, panel, tiles, tiled + r * ld, ld, 1);
}

INLINE void decode_tile(vec8 *out, int rate2, const uint8_t *tile, int codebook) {
    tile_reader reader = tile_open(rate2, tile);
    for (int group = 0; group < GROUPS; group++) out[group] = tile_decode(&reader, group, codebook);
}

/* `count` tiles, stride bytes apart, in trellis order. The codebook becomes a constant here, once for all callers. */
static void decode_tiles(vec8 *out, const struct mm_weight *weight, const uint8_t *tiles, int64_t stride, int64_t count) {
    switch (weight->codebook) {
#define X(id, name, multiplier, addend, half_rates)                                                               \
    case id:                                                                                                      \
        for (int64_t i = 0; i < count; i++) decode_tile(out + i * GROUPS, weight->rate2, tiles + i * stride, id); \
        break;
        MM_CODEBOOKS(X)
#undef X
    default:
        break;
    }
}

/* y [16 columns] of one row from its sums [8 columns]: the low half of a vector is column c, the high half c + 8 */
INLINE void reduce_columns(float *y, const vec8 *sums) {
    for (int c = 0; c < 8; c++) {
        const float *s = (const float *)&sums[c];
        y[c] = (s[0] + s[1]) + (s[2] + s[3]);
        y[c + 8] = (s[4] + s[5]) + (s[6] + s[7]);
    }
}

static void multiply_few(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                         int64_t rows, vec8 *sums) {
    memset(sums, 0, (size_t)rows * BLOCK_TILES * 8 * sizeof *sums);
    switch (weight->codebook * FUSED_ROWS + (int)rows - 1) {
#define X(id, name, multiplier, addend, half_rates)                                                       \
    case id * FUSED_ROWS: multiply_fused(sums, weight, block, tiled, ld, 1, id); break;                       \
    case id * FUSED_ROWS + 1: multiply_fused(sums, weight, block, tiled, ld, 2, id); break;                   \
    case id * FUSED_ROWS + 2: multiply_fused(sums, weight, block, tiled, ld, 3, id); break;                   \
    case id * FUSED_ROWS + 3: multiply_fused(sums, weight, block, tiled, ld, 4, id); break;
        MM_CODEBOOKS(X)
#undef X
    default:
        break;
    }
    for (int64_t i = 0; i < rows * BLOCK_TILES; i++) reduce_columns(y + i * MM_TILE, sums + i * 8);
}

static void multiply_many(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld,
                          int64_t rows, vec8 *sums) {
    vec8 *panel = sums + rows * 8;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    int64_t k_tiles = weight->k / MM_TILE;
    for (int j = 0; j < BLOCK_TILES; j++) {
        const uint8_t *column = weight->tiles + (block * BLOCK_TILES + j) * tile_bytes;
        memset(sums, 0, (size_t)rows * 8 * sizeof *sums);
        for (int64_t kt = 0; kt < k_tiles; kt += PANEL_TILES) {
            int64_t tiles = k_tiles - kt < PANEL_TILES ? k_tiles - kt : PANEL_TILES;
            decode_tiles(panel, weight, column + kt * row_bytes, row_bytes, tiles);
            multiply_panel(sums, panel, tiles, tiled + kt * 32, ld, rows);
        }
        for (int64_t r = 0; r < rows; r++) reduce_columns(y + r * MM_HADAMARD + j * MM_TILE, sums + r * 8);
    }
}

static void multiply(float *y, const struct mm_weight *weight, int64_t block, const float *tiled, int64_t ld, int64_t rows,
                     float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch;
    if (rows <= FUSED_ROWS)
        multiply_few(y, weight, block, tiled, ld, rows, sums);
    else
        multiply_many(y, weight, block, tiled, ld, rows, sums);
}

static void multiply_transposed(float *dx, const struct mm_weight *weight, int64_t block, const float *spread,
                                int64_t rows, float *scratch) {
    vec8 *sums = (vec8 *)(void *)scratch, *tile = sums + rows * 4;
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++) {
        const uint8_t *tiles = weight->tiles + (block * BLOCK_TILES + kt) * n_tiles * tile_bytes;
        memset(sums, 0, (size_t)rows * 4 * sizeof *sums);
        for (int64_t j = 0; j < n_tiles; j++) {
            decode_tiles(tile, weight, tiles + j * tile_bytes, 0, 1);
            for (int64_t r = 0; r < rows; r++) {
                const vec8 *grad = (const vec8 *)(const void *)(spread + r * 4 * weight->n + j * 64);
                vec8 sum[4] = {sums[r * 4], sums[r * 4 + 1], sums[r * 4 + 2], sums[r * 4 + 3]};
                for (int c = 0; c < 8; c++)
                    for (int q = 0; q < 4; q++) sum[q] += tile[c * 4 + q] * grad[c];
                for (int q = 0; q < 4; q++) sums[r * 4 + q] = sum[q];
            }
        }
        for (int64_t r = 0; r < rows; r++) {
            float *out = dx + r * MM_HADAMARD + kt * MM_TILE;
            for (int q = 0; q < 4; q++) {
                const float *s = (const float *)&sums[r * 4 + q];
                out[2 * q] = s[0] + s[4];
                out[2 * q + 1] = s[1] + s[5];
                out[2 * q + 8] = s[2] + s[6];
                out[2 * q + 9] = s[3] + s[7];
            }
        }
    }
}

static void dequantize(float *out, const struct mm_weight *weight, int64_t k_block, int64_t n_block, bool rotated) {
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), n_tiles = weight->n / MM_TILE;
    for (int kt = 0; kt < BLOCK_TILES; kt++)
        for (int j = 0; j < BLOCK_TILES; j++) {
            vec8 tile[GROUPS];
            int64_t index = (k_block * BLOCK_TILES + kt) * n_tiles + n_block * BLOCK_TILES + j;
            decode_tiles(tile, weight, weight->tiles + index * tile_bytes, 0, 1);
            for (int t = 0; t < MM_TILE_WEIGHTS; t++)
                out[(kt * MM_TILE + MM_TILE_ROW(t)) * MM_HADAMARD + j * MM_TILE + MM_TILE_COLUMN(t)] =
                    ((const float *)tile)[t];
        }
    if (rotated) return;
    float svh[MM_HADAMARD], suh[MM_HADAMARD];
    load_half(svh, weight->svh + n_block * MM_HADAMARD, MM_HADAMARD);
    load_half(suh, weight->suh + k_block * MM_HADAMARD, MM_HADAMARD);
    for (int row = 0; row < MM_HADAMARD; row++) hadamard128((vec8 *)(void *)(out + row * MM_HADAMARD));
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

#ifdef LEVEL
static const struct mm_kernels kernels = {
    .name = LEVEL,
    .exact = true,
    .prepare = prepare,
    .load = load,
    .store = store,
    .row_floats = row_floats,
    .rotate_in = rotate_in,
    .multiply = multiply,
    .rotate_out = rotate_out,
    .rotate_grad = rotate_grad,
    .multiply_transposed = multiply_transposed,
    .dequantize = dequantize,
    .activate = activate,
    .dot = dot,
};
#endif
