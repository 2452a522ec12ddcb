/* A row of 8-bit inputs times mul1's bytes, for NEON (see int16.h): a dword is one product, whose four bytes a dot product multiplies by the
 * same input. Two variants: FEAT_I8MM's usdot takes unsigned bytes as they are. FEAT_DotProd's sdot takes signed ones: an exclusive or
 * with 0x80 subtracts 128 from each, and 512 times the sum of the inputs comes in with the offset. */

/* y [16 columns of 128] += one block of a row times a column of 8 tiles, stride bytes apart; rate2 is a constant when inlined */
INLINE void multiply_row8(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride, int rate2, bool i8mm) {
    const int32_t subtracted = i8mm ? 0 : 512; /* of each byte sum */
    const int32x4_t start = vdupq_n_s32(row->row.offset + subtracted * (row->row.offset / -CENTRE));
    int32x4_t sums[4] = {start, start, start, start}; /* columns 0..3, 4..7, ... */
    const int8_t *q = row->repeated;
    for (int t = 0; t < BLOCK_TILES; t++, tile += stride, q += 4 * MM_TILE) {
        halves h[17];
        int8x16_t x[4]; /* 4 inputs each */
        prefetch_tiles(tile, stride, MM_TILE_BYTES(rate2));
        halves_of_tiles(h, rate2, tile);
        UNROLL(4) for (int i = 0; i < 4; i++) x[i] = vld1q_s8(q + 16 * i);
        UNROLL(32) for (int j = 0; j < 32; j++) {
            int end = (j + 1) * rate2 >> 1, i = (end + 15) / 16, side = j / 4 % 2;
            uint32x4_t words[2];
            multiply_states(words, funnel(h[i - 1], h[i], end - 16 * (i - 1)), MM_MUL1_MULTIPLIER);
            UNROLL(2) for (int half = 0; half < 2; half++) {
                int32x4_t *sum = &sums[2 * side + half];
                if (!i8mm) words[half] = veorq_u32(words[half], vdupq_n_u32(0x80808080));
                switch (j % 4 + (i8mm ? 4 : 0)) { /* by hand: older clangs' headers lack the intrinsics here */
#define CASE(lane)                                                                                                                  \
    case lane: __asm__("sdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(*sum) : "w"(words[half]), "w"(x[j / 8])); break;               \
    case lane + 4: __asm__("usdot %0.4s, %1.16b, %2.4b[" #lane "]" : "+w"(*sum) : "w"(words[half]), "w"(x[j / 8])); break;
                    CASE(0) CASE(1) CASE(2) CASE(3)
#undef CASE
                default: break;
                }
            }
        }
    }
    for (int i = 0; i < 4; i++) {
        float *out = y + 4 * i;
        vst1q_f32(out, vfmaq_n_f32(vld1q_f32(out), vcvtq_f32_s32(sums[i]), row->row.scale));
    }
}

#define X(rate2)                                                                                                     \
    static void multiply_row8_##rate2(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride) {      \
        multiply_row8(y, row, tile, stride, rate2, false);                                                           \
    }
MM_ALL_RATES2(X)
#undef X

END_TARGET
BEGIN_TARGET(I8MM_TARGET)
#define X(rate2)                                                                                                       \
    static void multiply_row8_i8mm_##rate2(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride) {   \
        multiply_row8(y, row, tile, stride, rate2, true);                                                              \
    }
MM_ALL_RATES2(X)
#undef X
END_TARGET
BEGIN_TARGET(LEVEL_TARGET)

typedef void (*row8_multiplier)(float *y, const struct row8 *row, const uint8_t *tile, int64_t stride);

static row8_multiplier row8_multiplier_of(int rate2) {
    switch (rate2) {
#define X(rate2) \
    case rate2: return has_i8mm ? multiply_row8_i8mm_##rate2 : multiply_row8_##rate2;
        MM_ALL_RATES2(X)
#undef X
    default: return 0;
    }
}
