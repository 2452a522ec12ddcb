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

typedef void (*row8_multiplier)(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride);

static row8_multiplier row8_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return has_i8mm ? multiply_row8_##rate2##_i8mm : multiply_row8_##rate2##_dotprod;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
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

/* y [16 columns of 128] += one block of a row times a column of 8 tiles, stride bytes apart; rate2 is a constant when inlined */
INLINE void ROW8(multiply_row8)(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride, int rate2) {
    const int32x4_t start = vdupq_n_s32(row->row.offset / CENTRE * (CENTRE - SUBTRACTED));
    int32x4_t sums[4] = {start, start, start, start}; /* columns 0..3, 4..7, ... */
    const int8_t *q = row->repeated;
    for (int t = 0; t < BLOCK_TILES; t++, tile += stride, q += REPEATS * MM_TILE) {
        halves h[17];
        int8x16_t x[4]; /* 4 inputs each */
        prefetch_tiles(tile, stride, MM_TILE_BYTES(rate2));
        halves_of_tiles(h, rate2, tile);
        UNROLL(4) for (int i = 0; i < 4; i++) x[i] = vld1q_s8(q + 16 * i);
        UNROLL(32) for (int j = 0; j < 32; j++) {
            int end = (j + 1) * rate2 >> 1, i = (end + 15) / 16, side = j / 4 % 2;
            uint32x4_t words[2];
            multiply_states(words, funnel(h[i - 1], h[i], end - 16 * (i - 1)), MM_MUL1_MULTIPLIER);
            UNROLL(2) for (int half = 0; half < 2; half++)
                sums[2 * side + half] = ROW8(add_bytes)(sums[2 * side + half], words[half], x[j / 8], j % 4);
        }
    }
    for (int side = 0; side < 2; side++) add_columns(y, sums + 2 * side, side, row->row.scale);
}

#define X(rate2)                                                                                                                 \
    static void ROW8(multiply_row8_##rate2)(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride) {            \
        ROW8(multiply_row8)(y, row, tile, stride, rate2);                                                                        \
    }
MM_ALL_RATES2(X)
#undef X

#endif
