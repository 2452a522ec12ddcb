/* mul1 in 16-bit integers: a weight is scale * (S - 510) + a small constant, S the sum of a product's four bytes, so a dot product
 * is an integer one and scale and constant follow once a block. Included by a level's file after kernels.h; codebooks other than
 * mul1 go to the level's own kernels, or, on rows of 8 bits, to those of pairs.h where a level defines INTEGERS_OF_PAIRS.
 *
 * What is exact and what is not: S and the integer sums are exact. The format's rounding of every weight to binary16 is left
 * out (at most 2^-10 of a weight's size), and a rotated row is rounded to 16 bits, with one scale for 128 inputs: each input is
 * off by at most 2^-16 of the block's largest. A row's result does not depend on its neighbours.
 *
 * How a tile is decoded: every lane of a vector has POSITIONS consecutive trellis positions of its own. They are whole bytes of the
 * stream, so their halfwords H1, H2, ... and H0, the 16 bits before them, lie at the same bits in all lanes, and a window is two
 * neighbouring halfwords shifted by a constant: no shift by lane, no mask. 32 positions are a whole column c and column c + 8; of 16,
 * lanes 2 c and 2 c + 1 have those columns' rows r and r + 4, r = {0, 1, 8, 9, 2, 3, 10, 11}: what a multiply-add of pairs sums.
 *
 * A level defines before:
 *   INT16_LEVEL                    its name; not needed where there is an INT8_LEVEL
 *   POSITIONS                      of a lane: 16 or 32
 *   MOST_ROWS                      rows multiplied at once, a power of two: how many sums the registers hold
 *   halves, sums32                 vectors of halfwords and of int32, on which + * work lane by lane; halves hold one tile or several
 *   FUNNEL                         (funnel.h)
 *   product_high(a, b)            upper halves of the unsigned products
 *   sums_of_bytes(low, high)           lane by lane, the sum of the two bytes of low and the two of high
 *   add_products(sums, s, q, step) sums [PARTS] += s * q, signed, q a tile's inputs: s[i] * q[step] for lane i, or for two lanes
 *                                  s[2 i] * q[2 step] + s[2 i + 1] * q[2 step + 1]
 *   halves_of_tiles(h, rate2, tile)  h[0], h[1], ... as above; rate2 is a constant
 *   larger(a, b)                   the larger one of every lane of two iwide
 *   round_values(v)                a wide to the nearest integers
 *   order_inputs(q, inputs)        q [128] = inputs, 16 bits of each, those of a tile in the order of the steps: by pairs of lanes 0 4 1 5
 *                                  8 12 9 13 2 6 3 7 10 14 11 15, or by whole lanes 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15
 *
 * It may define INT8_LEVEL too, the name of a level that rounds inputs to 8 bits, by at most 1/254 of a block's largest, with
 *   add_byte_products(sums, s, q)  sums += s * q in dwords: unsigned bytes of s, signed bytes of q [4], which all dwords share
 * There a row on its own multiplies the bytes of the products themselves, without adding them first; several go on as above, and all
 * sums are the same integers. Instead of add_byte_products it may define OWN_ROW8, a file with a row8_multiplier_of of its own, and
 * REPEATS, how often a row for it has each input. That file may define MANY_ROWS8 and multiply_rows8 for so many rows and more. */
#include <math.h>

#include "cpu/funnel.h"

#define CENTRE 510 /* of the byte sums, 0 .. 1020: halves the sums, so that 128 products of 16 bits stay within 32 */
#define PAIR_SCALE 4096 /* of the integers that stand for 3inst's and mcg's weights (pairs.h) */

#ifdef UNROUNDED_PAIRS /* panel.h */
#define PAIR_LIMIT MM_FLOAT_INPUTS
#define MULTIPLY_PAIRS multiply_unrounded
#else
#define PAIR_LIMIT 0
#define MULTIPLY_PAIRS multiply
#endif

#define LANES ((int)(sizeof(halves) / sizeof(uint16_t)))
#define TILES (LANES * POSITIONS / MM_TILE_WEIGHTS) /* side by side */
#define STEPS (POSITIONS / 2)                       /* of a product along a tile's rows: positions of one column in a lane */
#define SHARERS (32 / POSITIONS)                    /* lanes that share a column */
#define PARTS ((int)(TILES * sizeof(ivec8) / sizeof(sums32)))

#ifndef REPEATS
#define REPEATS 2
#endif

/* What a product takes inputs as, in the order of its steps. */
enum input_form { WORDS, REPEATED_BYTES, BYTES };

/* A rotated row, 128 inputs of it. */
struct row16 {
    union {
        int16_t q[MM_HADAMARD];
        int8_t repeated[REPEATS * MM_HADAMARD]; /* for products: each q twice, once for every byte of a halfword */
        int8_t once[MM_HADAMARD];               /* steps 0 and 4 of a tile in turn, 1 and 5, ... */
    };
    float scale;    /* of (S - 510) * q */
    float constant; /* what the weights' small constant adds to every column */
    int32_t offset; /* -510 * sum of q: turns sums of S * q into those of (S - 510) * q */
    int32_t unused[13];
};
_Static_assert(sizeof(struct row16) == 320, "whole cache lines");
#define ROW16_FLOATS ((int64_t)(sizeof(struct row16) / sizeof(float)))

INLINE void store_inputs(struct row16 *row, const iwide *inputs, enum input_form form) {
    _Alignas(64) int16_t q[MM_HADAMARD];
    if (form == WORDS) {
        order_inputs(row->q, inputs);
        return;
    }
    order_inputs(q, inputs);
#ifdef INTEGERS_OF_PAIRS
    if (form == BYTES) order_bytes(row->once, q);
#endif
    if (form == REPEATED_BYTES && REPEATS == 1)
        for (int at = 0; at < MM_HADAMARD; at++) row->repeated[at] = (int8_t)q[at];
    if (form == REPEATED_BYTES && REPEATS == 2)
        for (int at = 0; at < MM_HADAMARD / LANES; at++) {
            halves low = ((const halves *)(const void *)q)[at] & 0xFF;
            ((halves *)(void *)row->repeated)[at] = low | low << 8;
        }
}

/* v [128], rotated, to integers of at most `limit`. A NaN or Inf makes the block NaN; a block whose largest value is below 1e-34 counts as 0. */
INLINE void quantize(struct row16 *row, const wide *v, float limit, int codebook, enum input_form form) {
    iwide inputs[WIDES], largest = {0}, sums = {0}; /* sizes compare as integers, NaN above Inf above all others */
    UNROLL(16) for (int i = 0; i < WIDES; i++) largest = larger(largest, (iwide)v[i] & 0x7FFFFFFF);
    COMBINE_LANES(largest, larger);
    int finite = largest[0] < 0x7F800000 ? -1 : 0;
    float most = mm_float_of_bits((uint32_t)largest[0]), bad = most * 0.0f;
    float unit = most / limit, inverse = unit > 3e-39f ? 1.0f / unit : 0.0f;
    UNROLL(16) for (int i = 0; i < WIDES; i++) {
        inputs[i] = round_values(v[i] * inverse) & finite;
        sums += inputs[i];
    }
    store_inputs(row, inputs, form);
#define ADD(a, b) ((a) + (b))
    COMBINE_LANES(sums, ADD);
#undef ADD
    int32_t total = sums[0];
    if (codebook != MM_CODEBOOK_MUL1) {
        row->scale = unit / PAIR_SCALE + bad;
        row->constant = bad;
        row->offset = 0;
        return;
    }
    row->scale = MM_MUL1_SCALE * unit + bad;
    row->constant = ((1024 + CENTRE) * MM_MUL1_SCALE + MM_MUL1_BIAS) * unit * (float)total + bad;
    row->offset = -CENTRE * total;
}

INLINE void rotate_to_integers(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, float limit, int codebook,
                               enum input_form form) {
    for (int64_t i = 0; i < k; i += MM_HADAMARD, row += ROW16_FLOATS) {
        wide rotated[WIDES];
        scale_rotate(rotated, x + i, suh + i, used - i);
        quantize((struct row16 *)(void *)row, rotated, limit, codebook, form);
    }
}

#ifdef INT16_LEVEL
static int64_t row_floats_int16(int codebook) {
    return codebook == MM_CODEBOOK_MUL1 ? ROW16_FLOATS : row_floats(codebook);
}

static void rotate_in_int16(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows) {
    if (codebook == MM_CODEBOOK_MUL1)
        rotate_to_integers(row, x, suh, k, used, INT16_MAX, codebook, WORDS);
    else
        rotate_in(row, x, suh, k, used, codebook, rows);
}
#endif

/* The states of a tile, or of tiles side by side, and their products' halves, one after the other; rate2 is a constant when inlined. */
#define FOR_PRODUCTS(j, low, high, tile, rate2, ...)                                                                                 \
    do {                                                                                                                             \
        const halves zero = {0}, m_low = zero + (uint16_t)MM_MUL1_MULTIPLIER, m_high = zero + (uint16_t)(MM_MUL1_MULTIPLIER >> 16);   \
        halves h[POSITIONS / 2 + 1];                                                                                                 \
        halves_of_tiles(h, rate2, tile);                                                                                             \
        UNROLL(32) for (int j = 0; j < POSITIONS; j++) {                                                                             \
            halves state = window(h, j, rate2);                                                                                      \
            halves low = state * m_low, high = product_high(state, m_low) + state * m_high;                                          \
            __VA_ARGS__                                                                                                              \
        }                                                                                                                            \
    } while (0)

/* panel [8, POSITIONS]: the byte sums of TILES columns of 8 tiles; rate2 is a constant when inlined */
INLINE void decode_sums(halves *panel, struct column column, int rate2) {
    for (int t = 0; t < BLOCK_TILES; t++, column.tile += column.stride, panel += POSITIONS) {
        prefetch_tiles(column.tile, column.ahead, TILES * MM_TILE_BYTES(rate2));
        FOR_PRODUCTS(j, low, high, column.tile, rate2, panel[j] = sums_of_bytes(low, high););
    }
}

#define X(rate2) \
    static void decode_sums_##rate2(halves *panel, const struct column *column) { decode_sums(panel, *column, rate2); }
MM_ALL_RATES2(X)
#undef X

typedef void (*sums_decoder)(halves *panel, const struct column *column);

static sums_decoder decoder_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return decode_sums_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

/* y [16 TILES] += scale * sums: the columns of one side */
INLINE void add_columns(float *y, const sums32 *sums, int side, float scale) {
    ivec8 columns[TILES];
    memcpy(columns, sums, sizeof columns);
    for (int tile = 0; tile < TILES; tile++) {
        uvec8 *out = (uvec8 *)(void *)(y + tile * MM_TILE + side * 8);
        *out += __builtin_convertvector(columns[tile], vec8) * scale;
    }
}

#ifdef INTEGERS_OF_PAIRS
#include "cpu/pairs.h"
#define IN_8_BITS(codebook) true
#define INT8_LIMITS {INT8_MAX, INT8_MAX, INT8_MAX}
#else
#define IN_8_BITS(codebook) ((codebook) == MM_CODEBOOK_MUL1)
#define INT8_LIMITS {PAIR_LIMIT, PAIR_LIMIT, INT8_MAX}
#endif

/* y [rows, 16 TILES columns of 128] += one block of the rows times a panel; rows is a constant when inlined. Few rows have several
 * sums each, since one would wait for its own last addition. */
INLINE void multiply_sums_rows(float *y, const halves *panel, const float *row, int64_t ld, int rows) {
    const struct row16 *in[MOST_ROWS];
    sums32 sums[MOST_ROWS][2][PARTS];
    const sums32 zero = {0};
    int chains = MOST_ROWS / rows;
    for (int r = 0; r < rows; r++) {
        in[r] = (const struct row16 *)(const void *)(row + r * ld);
        for (int i = 0; i < 2 * PARTS * chains; i++)
            sums[r * chains + i / 2 / PARTS][i / PARTS % 2][i % PARTS] = zero + (i < 2 * PARTS ? in[r]->offset : 0);
    }
    for (int t = 0; t < BLOCK_TILES; t++, panel += POSITIONS)
        UNROLL(16) for (int step = 0; step < STEPS; step++) {
            halves left = panel[step / 4 * 8 + step % 4], right = panel[step / 4 * 8 + step % 4 + 4];
            UNROLL(8) for (int r = 0; r < rows; r++) {
                add_products(sums[r * chains + step % chains][0], left, in[r]->q + MM_TILE * t, step);
                add_products(sums[r * chains + step % chains][1], right, in[r]->q + MM_TILE * t, step);
            }
        }
    for (int r = 0; r < rows; r++)
        for (int side = 0; side < 2; side++) {
            for (int chain = 1; chain < chains; chain++)
                for (int part = 0; part < PARTS; part++)
                    sums[r * chains][side][part] += sums[r * chains + chain][side][part];
            add_columns(y + r * MM_HADAMARD, sums[r * chains][side], side, in[r]->scale);
        }
}

/* Sets y [rows, 128] to what the weights' small constant gives. */
static void start_columns(float *y, const float *row, int64_t ld, int64_t rows, int64_t blocks) {
    for (int64_t r = 0; r < rows; r++) {
        float constant = 0;
        for (int64_t b = 0; b < blocks; b++)
            constant += ((const struct row16 *)(const void *)(row + r * ld + b * ROW16_FLOATS))->constant;
        for (int c = 0; c < MM_HADAMARD; c++) y[r * MM_HADAMARD + c] = constant;
    }
}

static void multiply_integers(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                              float *scratch) {
    halves *panel = (halves *)(void *)scratch;
    sums_decoder decode = weight->codebook == MM_CODEBOOK_MUL1 ? decoder_of(weight->rate2) : 0;
    int64_t blocks = weight->k / MM_HADAMARD, tile_bytes = MM_TILE_BYTES(weight->rate2);
    start_columns(y, row, ld, rows, blocks);
    for (int64_t b = 0; b < blocks; b++) { /* then its columns: tiles side by side lie in the same pages */
        const float *in = row + b * ROW16_FLOATS;
        struct column column = column_of(weight, block, b, 0, BLOCK_TILES);
        for (int j = 0; j < BLOCK_TILES; j += TILES, column.tile += TILES * tile_bytes) {
            float *out = y + j * MM_TILE;
            int64_t r = 0;
            if (decode) decode(panel, &column);
#ifdef INTEGERS_OF_PAIRS
            else decode_pairs(panel, weight, &column);
#endif
#define X(count)                                  \
    for (; count <= MOST_ROWS && r + count <= rows; r += count) \
        multiply_sums_rows(out + r * MM_HADAMARD, panel, in + r * ld, ld, count <= MOST_ROWS ? count : 1);
            X(8) X(4) X(3) X(2) X(1)
#undef X
        }
    }
}

#ifdef INT16_LEVEL
static void multiply_int16(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                           float *scratch) {
    if (weight->codebook == MM_CODEBOOK_MUL1)
        multiply_integers(y, weight, block, row, ld, rows, scratch);
    else
        MULTIPLY_PAIRS(y, weight, block, row, ld, rows, scratch);
}

static const struct mm_kernels kernels_int16 = {
    .name = INT16_LEVEL,
    .input_limits = {PAIR_LIMIT, PAIR_LIMIT, INT16_MAX},
    .prepare = prepare,
    .row_floats = row_floats_int16,
    .rotate_in = rotate_in_int16,
    .multiply = multiply_int16,
    SHARED_KERNELS,
};
#endif

/* ---- 8 bits ---- */

#ifdef INT8_LEVEL

#ifdef OWN_ROW8
#include OWN_ROW8
#else
/* y [16 TILES columns of 128] += one block of a row times TILES columns of 8 tiles; rate2 is a constant when inlined */
INLINE void multiply_row8(float *y, const struct row16 *row, struct column column, int rate2) {
    const sums32 none = {0};
    sums32 sums[2][2] = {{none + row->offset, none}, {none + row->offset, none}}; /* [side][half of a product] */
    const int8_t *q = row->repeated;
    for (int t = 0; t < BLOCK_TILES; t++, column.tile += column.stride, q += 2 * MM_TILE) {
        prefetch_tiles(column.tile, column.ahead, TILES * MM_TILE_BYTES(rate2));
        FOR_PRODUCTS(j, low, high, column.tile, rate2, {
            const int8_t *bytes = q + 2 * SHARERS * (j / 8 * 4 + j % 4);
            add_byte_products(&sums[j / 4 % 2][0], low, bytes);
            add_byte_products(&sums[j / 4 % 2][1], high, bytes);
        });
    }
    for (int side = 0; side < 2; side++) {
        sums[side][0] += sums[side][1];
        add_columns(y, sums[side], side, row->scale);
    }
}

#define X(rate2)                                                                                                       \
    static void multiply_row8_##rate2(float *y, const struct row16 *row, const struct column *column) { multiply_row8(y, row, *column, rate2); }
MM_ALL_RATES2(X)
#undef X

typedef void (*row8_multiplier)(float *y, const struct row16 *row, const struct column *column);

static row8_multiplier row8_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return multiply_row8_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}
#endif

#ifndef MANY_ROWS8
#define MANY_ROWS8 INT64_MAX
#define multiply_rows8 multiply_integers
#endif

static int64_t row_floats_int8(int codebook) {
    return IN_8_BITS(codebook) ? ROW16_FLOATS : row_floats(codebook);
}

static void rotate_in_int8(float *row, const float *x, const uint16_t *suh, int64_t k, int64_t used, int codebook, int64_t rows) {
    bool products = codebook == MM_CODEBOOK_MUL1 && (rows == 1 || rows >= MANY_ROWS8);
    if (IN_8_BITS(codebook))
        rotate_to_integers(row, x, suh, k, used, INT8_MAX, codebook, products ? REPEATED_BYTES : WORDS);
    else
        rotate_in(row, x, suh, k, used, codebook, rows);
}

static void multiply_int8(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                          float *scratch) {
    if (!IN_8_BITS(weight->codebook)) {
        MULTIPLY_PAIRS(y, weight, block, row, ld, rows, scratch);
        return;
    }
    if (rows > 1) {
        (rows >= MANY_ROWS8 ? multiply_rows8 : multiply_integers)(y, weight, block, row, ld, rows, scratch);
        return;
    }
    row8_multiplier multiply_one = weight->codebook == MM_CODEBOOK_MUL1 ? row8_multiplier_of(weight->rate2) : 0;
    int64_t blocks = weight->k / MM_HADAMARD, tile_bytes = MM_TILE_BYTES(weight->rate2);
    const struct row16 *in = (const struct row16 *)(const void *)row;
    start_columns(y, row, ld, rows, blocks);
    for (int64_t b = 0; b < blocks; b++) {
        struct column column = column_of(weight, block, b, 0, BLOCK_TILES);
        for (int j = 0; j < BLOCK_TILES; j += TILES, column.tile += TILES * tile_bytes) {
            if (multiply_one) multiply_one(y + j * MM_TILE, in + b, &column);
#ifdef INTEGERS_OF_PAIRS
            else multiply_pair_row(y + j * MM_TILE, &in[b], weight, &column);
#endif
        }
    }
}

static const struct mm_kernels kernels_int8 = {
    .name = INT8_LEVEL,
    .input_limits = INT8_LIMITS,
    .prepare = prepare,
    .row_floats = row_floats_int8,
    .rotate_in = rotate_in_int8,
    .multiply = multiply_int8,
    SHARED_KERNELS,
};
#endif
