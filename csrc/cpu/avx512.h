/* The body of the levels for AVX-512: two tiles at a time, with VBMI's byte permute, VBMI2's funnel shift and VNNI's multiply-add. Ice Lake
 * and Zen 4 were the first to have all three; CPUs with less of AVX-512 run AVX2's levels. Included by a level's file between x86.h and
 * END_TARGET, after x86_asm.h; it may define HALF_ARITHMETIC: the CPU has arithmetic on binary16. */

typedef uint16_t halves __attribute__((vector_size(64), may_alias));
typedef int16_t shorts __attribute__((vector_size(64), may_alias));
typedef float floats __attribute__((vector_size(64), may_alias));
typedef int32_t sums32 __attribute__((vector_size(64), may_alias));
#define FUNNEL(before, after, shift) (halves)_mm512_shldi_epi16((__m512i)(before), (__m512i)(after), shift)

INLINE halves product_high(halves a, halves b) { return (halves)_mm512_mulhi_epu16((__m512i)a, (__m512i)b); }

INLINE halves sums_of_bytes(halves low, halves high) {
    __m512i one = _mm512_set1_epi8(1);
    return (halves)_mm512_maddubs_epi16((__m512i)low, one) + (halves)_mm512_maddubs_epi16((__m512i)high, one);
}

#include "cpu/gather_avx512.h"

/* ---- exact, in float32 ---- */

INLINE floats repeat_pair(const float *pair) {
    double both;
    memcpy(&both, pair, sizeof both);
    return (floats)_mm512_castpd_ps(_mm512_set1_pd(both));
}

#define COLUMNS_TOGETHER 2
#define PANEL_ROWS 6

#ifdef HALF_ARITHMETIC

#define LANE_TILE(vector, lane) ((vector) & 1) /* converted 16 lanes at a time */
#define LANE_COLUMN(vector, lane) (8 * ((vector) / 2) + (lane) / 2)

/* Two binary16 numbers added, from a product's halves. */
INLINE __m512i sum_of_pair(halves low, halves high, uint32_t addend, uint32_t flip) {
    const halves zero = {0}, first = zero + (uint16_t)addend, kept = zero + (uint16_t)MM_PAIR_AND, flipped = zero + (uint16_t)flip;
    __m512i sum;
    if (addend) {
        low += first;
        high += (uint16_t)(addend >> 16);
        __mmask32 carry = _mm512_cmplt_epu16_mask((__m512i)low, (__m512i)first);
        high = (halves)_mm512_mask_add_epi16((__m512i)high, carry, (__m512i)high, _mm512_set1_epi16(1));
    }
    _Static_assert(MM_PAIR_AND >> 16 == (MM_PAIR_AND & 0xFFFFu) && MM_PAIR_XOR >> 16 == (MM_PAIR_XOR & 0xFFFFu), "both halves");
    VADDPH(sum, (low & kept) ^ flipped, (high & kept) ^ flipped);
    return sum;
}

/* The upper three bits of both exponents turn from 011 to 110, which is the number 4096 times. */
#define PAIR_SCALE_FLIP 0x5000u
INLINE halves integers_of_pairs(halves low, halves high, uint32_t addend) {
    __m512i sum = sum_of_pair(low, high, addend, MM_PAIR_XOR ^ PAIR_SCALE_FLIP);
    VCVTPH2W(sum, sum);
    return (halves)sum;
}
#define INTEGERS_OF_PAIRS integers_of_pairs

INLINE void order_bytes(int8_t *once, const int16_t *q) {
    static const alignas(64) uint8_t lower[64] = { /* of two tiles; the rest is not used */
        0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30, 32, 48, 34, 50, 36, 52, 38, 54, 40, 56, 42, 58, 44, 60, 46, 62};
    for (int tile = 0; tile < BLOCK_TILES; tile += 2) {
        __m512i bytes = _mm512_permutexvar_epi8(_mm512_load_si512(lower), _mm512_loadu_si512(q + MM_TILE * tile));
        _mm256_storeu_si256((__m256i *)(void *)(once + MM_TILE * tile), _mm512_castsi512_si256(bytes));
    }
}

/* The format's own arithmetic: two binary16 numbers added, or one multiply-add, rounded once. */
INLINE void values_of_products(floats (*out)[2], halves *low, halves *high, uint32_t addend, int codebook, bool rounded) {
    (void)rounded; /* by the addition itself */
    const halves zero = {0};
    for (int i = 0; i < 2; i++) {
        __m512i value;
        if (codebook == MM_CODEBOOK_MUL1) { /* the bits 0x6400 + S are the number 1024 + S, S being at most 1020 */
            const halves scale = zero + mm_half_of_float(MM_MUL1_SCALE), bias = zero + mm_half_of_float(MM_MUL1_BIAS);
            value = (__m512i)(sums_of_bytes(low[i], high[i]) + (uint16_t)0x6400);
            VFMADD213PH(value, scale, bias);
        } else {
            value = sum_of_pair(low[i], high[i], addend, MM_PAIR_XOR);
        }
        out[i][0] = (floats)_mm512_cvtph_ps(_mm512_castsi512_si256(value));
        out[i][1] = (floats)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(value, 1));
    }
}

INLINE void store_columns(float *y, const floats *sums) {
    for (int v = 0; v < 4; v++) {
        const vec8 *lanes = (const vec8 *)&sums[v];
        __m256d pairs = _mm256_castps_pd((__m256)add_pairs(lanes[0], lanes[1])); /* columns 0 1 4 5 2 3 6 7 */
        *(uvec8 *)(void *)(y + MM_TILE * LANE_TILE(v, 0) + LANE_COLUMN(v, 0)) = (uvec8)_mm256_castpd_ps(_mm256_permute4x64_pd(pairs, 0xD8));
    }
}

#else

INLINE void interleave(floats *out, halves low, halves high) {
    out[0] = (floats)_mm512_unpacklo_epi16((__m512i)low, (__m512i)high);
    out[1] = (floats)_mm512_unpackhi_epi16((__m512i)low, (__m512i)high);
}

INLINE void store_columns(float *y, const floats *sums) {
    for (int tile = 0; tile < 2; tile++)
        for (int side = 0; side < 2; side++)
            *(uvec8 *)(void *)(y + MM_TILE * tile + 8 * side) =
                add_pairs(((const vec8 *)&sums[2 * side])[tile], ((const vec8 *)&sums[2 * side + 1])[tile]);
}

#include "cpu/values.h"
#endif
#include "cpu/panel.h"

/* ---- mul1 in 16-bit integers ---- */

#define POSITIONS 16
#define MOST_ROWS 8

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    VPDPWSSD(sums[0], s, _mm512_set1_epi32(dword_at(q + 2 * step)));
}

INLINE void add_byte_products(sums32 *sums, halves s, const int8_t *q) {
    VPDPBUSD(*sums, s, _mm512_set1_epi32(dword_at(q)));
}

#include "cpu/int16.h"
