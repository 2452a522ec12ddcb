/* A row of 8-bit inputs times mul1's bytes, for NEON (see int16.h): a dword is one product, whose four bytes a dot product multiplies by the
 * same input. FEAT_I8MM's usdot takes unsigned bytes as they are. FEAT_DotProd's sdot takes signed ones: an exclusive or with 0x80
 * subtracts 128 from each, which changes what the sums start with. The file includes itself, once for either. */
#ifndef ROW8

#define ROW8(name) name##_dotprod
#define SUBTRACTED 512 /* from a byte sum */
#define ADD_BYTES(sum, words, x, lane) vdotq_laneq_s32(sum, vreinterpretq_s8_u32(veorq_u32(words, vdupq_n_u32(0x80808080))), x, lane)
#include "cpu/row8_neon.h"
#undef ROW8
#undef SUBTRACTED
#undef ADD_BYTES

END_TARGET
BEGIN_TARGET(I8MM_TARGET)
#define ROW8(name) name##_i8mm
#define SUBTRACTED 0
#define ADD_BYTES(sum, words, x, lane) vusdotq_laneq_s32(sum, vreinterpretq_u8_u32(words), x, lane)
#include "cpu/row8_neon.h"
END_TARGET
BEGIN_TARGET(LEVEL_TARGET)

typedef void (*row8_multiplier)(float *y, const struct row16 *row, const struct column *column);

static row8_multiplier row8_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return has_i8mm ? multiply_row8_##rate2##_i8mm : multiply_row8_##rate2##_dotprod;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

/* ---- many rows ---- */

/* The byte sum S, of 10 bits, in two digits: S - 510 = 4 a + b + 2, a = S / 4 - 128 and b = S % 4, a byte each. Four steps of a column make
 * a dword, so that one dot product takes 16 digits: half of the instructions of a multiply-add of 16 bits, after more work to decode. */
#define MANY_ROWS8 4 /* from which on that pays; as many at once */
#define SIDE_DIGITS (BLOCK_TILES * 16) /* vectors: of 8 columns */

/* panel [2 sides, 8 tiles, 4 times 4 steps, 2 halves of 8 columns, a and b]; rate2 is a constant when inlined */
INLINE void decode_digits(uint8x16_t *panel, struct column column, int rate2) {
    for (int t = 0; t < BLOCK_TILES; t++, column.tile += column.stride, panel += 16) {
        halves h[17];
        prefetch_tiles(column.tile, column.ahead, MM_TILE_BYTES(rate2));
        halves_of_tiles(h, rate2, column.tile);
        UNROLL(8) for (int four = 0; four < 8; four++) {
            halves s[4], a[2], b[2];
            uint8x16_t *out = panel + four % 2 * SIDE_DIGITS + four / 2 * 4;
            UNROLL(4) for (int j = 0; j < 4; j++) {
                uint32x4_t words[2];
                multiply_states(words, window(h, 4 * four + j, rate2), MM_MUL1_MULTIPLIER);
                s[j] = byte_sums(words);
            }
            UNROLL(2) for (int i = 0; i < 2; i++) {
                a[i] = vsriq_n_u16(vshlq_n_u16(s[2 * i + 1], 6), vshlq_n_u16(s[2 * i], 6), 8);
                b[i] = vsliq_n_u16(s[2 * i], s[2 * i + 1], 8);
            }
            out[0] = veorq_u8(vreinterpretq_u8_u16(vzip1q_u16(a[0], a[1])), vdupq_n_u8(0x80));
            out[1] = vandq_u8(vreinterpretq_u8_u16(vzip1q_u16(b[0], b[1])), vdupq_n_u8(3));
            out[2] = veorq_u8(vreinterpretq_u8_u16(vzip2q_u16(a[0], a[1])), vdupq_n_u8(0x80));
            out[3] = vandq_u8(vreinterpretq_u8_u16(vzip2q_u16(b[0], b[1])), vdupq_n_u8(3));
        }
    }
}

#define X(rate2) \
    static void decode_digits_##rate2(uint8x16_t *panel, const struct column *column) { decode_digits(panel, *column, rate2); }
MM_ALL_RATES2(X)
#undef X

typedef void (*digits_decoder)(uint8x16_t *panel, const struct column *column);

static digits_decoder digits_decoder_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return decode_digits_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}

INLINE int32x4_t add_digits(int32x4_t sum, uint8x16_t digits, int8x16_t x, int lane) {
    int8x16_t w = vreinterpretq_s8_u8(digits);
    switch (lane) {
    case 0: return vdotq_laneq_s32(sum, w, x, 0);
    case 1: return vdotq_laneq_s32(sum, w, x, 1);
    case 2: return vdotq_laneq_s32(sum, w, x, 2);
    default: return vdotq_laneq_s32(sum, w, x, 3);
    }
}

/* y [rows, 16 columns of 128] += one block of the rows times a panel; rows is a constant when inlined */
INLINE void multiply_digits(float *y, const uint8x16_t *panel, const float *row, int64_t ld, int rows) {
    const struct row16 *in[MANY_ROWS8];
    UNROLL(4) for (int r = 0; r < rows; r++) in[r] = (const struct row16 *)(const void *)(row + r * ld);
    for (int side = 0; side < 2; side++) {
        int32x4_t sums[MANY_ROWS8][2][2]; /* [half][a, b] */
        UNROLL(4) for (int r = 0; r < rows; r++)
            UNROLL(4) for (int i = 0; i < 4; i++) sums[r][i / 2][i % 2] = vdupq_n_s32(i % 2 ? in[r]->offset / -CENTRE * 2 : 0);
        for (int t = 0; t < BLOCK_TILES; t++, panel += 16) {
            int8x16_t x[MANY_ROWS8];
            UNROLL(4) for (int r = 0; r < rows; r++) x[r] = vld1q_s8(in[r]->repeated + MM_TILE * t);
            UNROLL(4) for (int four = 0; four < 4; four++)
                UNROLL(4) for (int i = 0; i < 4; i++)
                    UNROLL(4) for (int r = 0; r < rows; r++)
                        sums[r][i / 2][i % 2] = add_digits(sums[r][i / 2][i % 2], panel[4 * four + i], x[r], four);
        }
        UNROLL(4) for (int r = 0; r < rows; r++) {
            int32x4_t whole[2];
            UNROLL(2) for (int half = 0; half < 2; half++) whole[half] = vmlaq_n_s32(sums[r][half][1], sums[r][half][0], 4);
            add_columns(y + r * MM_HADAMARD, whole, side, in[r]->scale);
        }
    }
}

static void multiply_rows8(float *y, const struct mm_weight *weight, int64_t block, const float *row, int64_t ld, int64_t rows,
                           float *scratch) {
    uint8x16_t *panel = (uint8x16_t *)(void *)scratch;
    digits_decoder decode = digits_decoder_of(weight->rate2);
    int64_t blocks = weight->k / MM_HADAMARD;
    start_columns(y, row, ld, rows, blocks);
    for (int j = 0; j < BLOCK_TILES; j++) {
        for (int64_t b = 0; b < blocks; b++) {
            const float *in = row + b * ROW16_FLOATS;
            float *out = y + j * MM_TILE;
            int64_t r = 0;
            struct column column = column_of(weight, block, b, j, 1);
            decode(panel, &column);
#define X(count) \
    for (; r + count <= rows; r += count) multiply_digits(out + r * MM_HADAMARD, panel, in + r * ld, ld, count);
            X(4) X(3) X(2) X(1)
#undef X
        }
    }
}

#else

INLINE int32x4_t ROW8(add_bytes)(int32x4_t sum, uint32x4_t words, int8x16_t x, int lane) {
    switch (lane) {
    case 0: return ADD_BYTES(sum, words, x, 0);
    case 1: return ADD_BYTES(sum, words, x, 1);
    case 2: return ADD_BYTES(sum, words, x, 2);
    default: return ADD_BYTES(sum, words, x, 3);
    }
}

/* y [16 columns of 128] += one block of a row times a column of 8 tiles; rate2 is a constant when inlined */
INLINE void ROW8(multiply_row8)(float *y, const struct row16 *row, struct column column, int rate2) {
    const int32x4_t start = vdupq_n_s32(row->offset / CENTRE * (CENTRE - SUBTRACTED));
    int32x4_t sums[4] = {start, start, start, start}; /* columns 0..3, 4..7, ... */
    const int8_t *q = row->repeated;
    for (int t = 0; t < BLOCK_TILES; t++, column.tile += column.stride, q += MM_TILE) {
        halves h[17];
        int8x16_t x[4], inputs = vld1q_s8(q), twice[2] = {vzip1q_s8(inputs, inputs), vzip2q_s8(inputs, inputs)}; /* x: 4 times, of 4 */
        prefetch_tiles(column.tile, column.ahead, MM_TILE_BYTES(rate2));
        halves_of_tiles(h, rate2, column.tile);
        UNROLL(2) for (int i = 0; i < 2; i++) {
            x[2 * i] = vzip1q_s8(twice[i], twice[i]);
            x[2 * i + 1] = vzip2q_s8(twice[i], twice[i]);
        }
        UNROLL(32) for (int j = 0; j < 32; j++) {
            int side = j / 4 % 2;
            uint32x4_t words[2];
            multiply_states(words, window(h, j, rate2), MM_MUL1_MULTIPLIER);
            UNROLL(2) for (int half = 0; half < 2; half++)
                sums[2 * side + half] = ROW8(add_bytes)(sums[2 * side + half], words[half], x[j / 8], j % 4);
        }
    }
    for (int side = 0; side < 2; side++) add_columns(y, sums + 2 * side, side, row->scale);
}

#define X(rate2)                                                                                                                 \
    static void ROW8(multiply_row8_##rate2)(float *y, const struct row16 *row, const struct column *column) { ROW8(multiply_row8)(y, row, *column, rate2); }
MM_ALL_RATES2(X)
#undef X

#endif
