/* mul1 in 16-bit integers: a weight is scale * (S - 510) + a small constant, S the sum of a product's four bytes, so a dot product
 * is an integer one and scale and constant follow once a block. Included by a level's file after kernels.h; codebooks other than
 * mul1 go to the level's own kernels.
 *
 * What is exact and what is not: S and the integer sums are exact. The format's rounding of every weight to binary16 is left
 * out (at most 2^-10 of a weight's size), and a rotated row is rounded to 16 bits, with one scale for 128 inputs: each input is
 * off by at most 2^-16 of the block's largest. A row's result does not depend on its neighbours.
 *
 * How a tile is decoded: 16 lanes hold the same place of 16 groups of 16 positions. A group is rate2 bytes of the stream, so its
 * halfwords H0, H1, ... and the 16 bits before them lie at the same bits for all groups, and a window is two neighbouring halfwords
 * shifted by a constant: no shift by lane, no mask. Group g holds rows 4 (g & 1) + {0, 1, 8, 9, 2, 3, 10, 11} of columns g / 2 (first
 * the four of {0, 1, 8, 9}) and g / 2 + 8, so that two neighbouring lanes are two rows of one column: what a multiply-add of pairs sums.
 *
 * A level defines before:
 *   INT16_LEVEL                    its name
 *   half16                         16 halfwords; + - | << >> work lane by lane on it
 *   multiply_high(a, b)            upper halves of the unsigned products
 *   byte_sums(low, high)           lane by lane, the sum of the two bytes of low and the two of high
 *   add_products(sums, s, pair)    sums [8 int32] + s[2 i] * low(pair) + s[2 i + 1] * high(pair), signed
 *   gather_halves(h, rate2, tile)  h[0] = the 16 bits before each group, h[1 ...] = its halfwords; rate2 is a constant
 *   round_values(v)                8 floats to the nearest integers */
#include <math.h>

#define CENTRE 510 /* of the byte sums, 0 .. 1020: halves the sums, so that 128 products of 16 bits stay within 32 */
#define LARGEST 32767

/* A rotated row, 128 inputs of it. q is in the order of trellis positions: 8 pairs a tile, rows r and r + 4. */
struct row16 {
    int16_t q[MM_HADAMARD];
    float scale;    /* of (S - 510) * q */
    float constant; /* what the weights' small constant adds to every column */
    int32_t offset; /* -510 * sum of q: turns sums of S * q into those of (S - 510) * q */
    int32_t unused[13];
};
_Static_assert(sizeof(struct row16) == 320, "whole cache lines");
#define ROW16_FLOATS ((int64_t)(sizeof(struct row16) / sizeof(float)))
#define PANEL16 (BLOCK_TILES * 16) /* vectors of byte sums in a column of 8 tiles: 4 KB */

static int64_t row_floats_int16(int codebook) {
    return codebook == MM_CODEBOOK_MUL1 ? ROW16_FLOATS : row_floats(codebook);
}

/* v [128], rotated, to 16 bits. A NaN or Inf makes the block NaN; a block whose largest value is below 1e-34 counts as 0. */
INLINE void quantize(struct row16 *row, const vec8 *v) {
    const vec8 zero = {0};
    vec8 largest = zero, poison = zero;
    for (int i = 0; i < 16; i++) {
        vec8 size = (vec8)((ivec8)v[i] & 0x7FFFFFFF);
        largest = choose(size > largest, size, largest);
        poison += v[i] * 0.0f;
    }
    float most = 0, bad = 0;
    for (int i = 0; i < 8; i++) most = largest[i] > most ? largest[i] : most, bad += poison[i];
    float step = most / LARGEST, inverse = step > 3e-39f ? 1.0f / step : 0.0f;
    ivec8 sums = {0};
    int16_t plain[MM_HADAMARD];
    for (int i = 0; i < 16; i++) {
        ivec8 rounded = {0};
        if (bad == 0) rounded = round_values(v[i] * inverse);
        for (int j = 0; j < 8; j++) plain[8 * i + j] = (int16_t)rounded[j];
        sums += rounded;
    }
    int32_t total = 0;
    for (int i = 0; i < 8; i++) total += sums[i];
    for (int tile = 0; tile < BLOCK_TILES; tile++)
        for (int pair = 0; pair < 8; pair++) {
            int r = MM_TILE * tile + 2 * (pair / 4) + (pair & 1) + 8 * (pair / 2 & 1);
            row->q[MM_TILE * tile + 2 * pair] = plain[r];
            row->q[MM_TILE * tile + 2 * pair + 1] = plain[r + 4];
        }
    row->scale = MM_MUL1_SCALE * step + bad;
    row->constant = ((1024 + CENTRE) * MM_MUL1_SCALE + MM_MUL1_BIAS) * step * (float)total + bad;
    row->offset = -CENTRE * total;
}

static void rotate_in_int16(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook) {
    if (codebook != MM_CODEBOOK_MUL1) {
        rotate_in(row, x, suh, k, used, codebook);
        return;
    }
    for (int64_t i = 0; i < k; i += MM_HADAMARD, row += ROW16_FLOATS) {
        vec8 rotated[16];
        scale_rotate(rotated, x + i, suh + i, used - i);
        quantize((struct row16 *)(void *)row, rotated);
    }
}

/* panel [8 tiles, 16]: the byte sums of 8 tiles, stride bytes apart; rate2 is a constant when inlined */
INLINE void decode_sums(half16 *panel, const uint8_t *tile, int64_t stride, int rate2) {
    static const uint32_t multipliers[] = {
#define X(id, name, multiplier, addend, half_rates) multiplier,
        MM_CODEBOOKS(X)
#undef X
    };
    const uint32_t multiplier = multipliers[MM_CODEBOOK_MUL1];
    const half16 zero = {0}, low = zero + (uint16_t)multiplier, high = zero + (uint16_t)(multiplier >> 16);
    for (int t = 0; t < BLOCK_TILES; t++, tile += stride, panel += 16) {
        half16 h[10];
        __builtin_prefetch(tile + BLOCK_TILES * stride);
        gather_halves(h, rate2, tile);
        UNROLL(16) for (int j = 0; j < 16; j++) {
            int end = (j + 1) * rate2 >> 1, i = (end + 15) / 16, shift = end - 16 * (i - 1);
            half16 state = h[i];
            if (shift < 16) state = h[i - 1] << shift | h[i] >> (16 - shift);
            panel[j] = byte_sums(state * low, multiply_high(state, low) + state * high);
        }
    }
}

#define X(rate2) \
    static void decode_sums_##rate2(half16 *panel, const uint8_t *tile, int64_t stride) { decode_sums(panel, tile, stride, rate2); }
MM_ALL_RATES2(X)
#undef X

typedef void (*sums_decoder)(half16 *panel, const uint8_t *tile, int64_t stride);

static sums_decoder decoder_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return decode_sums_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

/* y [rows, 16 columns of 128] += one block of the rows times a panel; rows is a constant when inlined */
INLINE void multiply_sums_rows(float *y, const half16 *panel, const float *row, int64_t ld, int rows) {
    const struct row16 *in[4];
    ivec8 sums[4][2];
    for (int r = 0; r < rows; r++) {
        in[r] = (const struct row16 *)(const void *)(row + r * ld);
        sums[r][0] = sums[r][1] = (ivec8){0} + in[r]->offset;
    }
    for (int t = 0; t < BLOCK_TILES; t++)
        UNROLL(8) for (int pair = 0; pair < 8; pair++) {
            half16 left = panel[t * 16 + pair / 4 * 8 + pair % 4], right = panel[t * 16 + pair / 4 * 8 + pair % 4 + 4];
            UNROLL(4) for (int r = 0; r < rows; r++) {
                int32_t both;
                memcpy(&both, in[r]->q + MM_TILE * t + 2 * pair, sizeof both);
                sums[r][0] = add_products(sums[r][0], left, both);
                sums[r][1] = add_products(sums[r][1], right, both);
                KEEP(sums[r][0]);
                KEEP(sums[r][1]);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int side = 0; side < 2; side++) {
            uvec8 *out = (uvec8 *)(void *)(y + r * MM_HADAMARD + 8 * side);
            *out += __builtin_convertvector(sums[r][side], vec8) * in[r]->scale;
        }
}

static void multiply_int16(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                           float *scratch) {
    if (weight->codebook != MM_CODEBOOK_MUL1) {
        multiply(y, weight, block, row, ld, rows, scratch);
        return;
    }
    half16 *panel = (half16 *)(void *)scratch;
    sums_decoder decode = decoder_of(weight->rate2);
    int64_t tile_bytes = MM_TILE_BYTES(weight->rate2), row_bytes = weight->n / MM_TILE * tile_bytes;
    int64_t blocks = weight->k / MM_HADAMARD;
    for (int64_t r = 0; r < rows; r++) {
        float constant = 0;
        for (int64_t b = 0; b < blocks; b++)
            constant += ((const struct row16 *)(const void *)(row + r * ld + b * ROW16_FLOATS))->constant;
        for (int c = 0; c < MM_HADAMARD; c++) y[r * MM_HADAMARD + c] = constant;
    }
    for (int j = 0; j < BLOCK_TILES; j++) {
        const uint8_t *column = weight->tiles + (block * BLOCK_TILES + j) * tile_bytes;
        for (int64_t b = 0; b < blocks; b++) {
            const float *in = row + b * ROW16_FLOATS;
            float *out = y + j * MM_TILE;
            int64_t r = 0;
            decode(panel, column + b * BLOCK_TILES * row_bytes, row_bytes);
            for (; r + 4 <= rows; r += 4) multiply_sums_rows(out + r * MM_HADAMARD, panel, in + r * ld, ld, 4);
            if (rows - r == 3) multiply_sums_rows(out + r * MM_HADAMARD, panel, in + r * ld, ld, 3);
            if (rows - r == 2) multiply_sums_rows(out + r * MM_HADAMARD, panel, in + r * ld, ld, 2);
            if (rows - r == 1) multiply_sums_rows(out + r * MM_HADAMARD, panel, in + r * ld, ld, 1);
        }
    }
}

static const struct mm_kernels kernels_int16 = {
    .name = INT16_LEVEL,
    .prepare = prepare,
    .load = load,
    .store = store,
    .row_floats = row_floats_int16,
    .rotate_in = rotate_in_int16,
    .multiply = multiply_int16,
    .rotate_out = rotate_out,
    .rotate_grad = rotate_grad,
    .multiply_transposed = multiply_transposed,
    .dequantize = dequantize,
    .activate = activate,
    .dot = dot,
    .dots = dots,
};
