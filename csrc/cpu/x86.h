/* What the levels for x86 share: the float kernels, for AVX2 (with FMA and F16C) whatever the build's flags. 8 trellis positions at a
 * time, windows by byte shuffle and per-lane shift (windows.h), half conversions in hardware; and what the CPU and the system can do.
 * Included once by a level's file, which may define LEVEL (kernels.h). */
#include <cpuid.h>
#include <immintrin.h>

#include "cpu/vector.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

/* 3inst and mcg widen each half of a lane with two conversions and gather low and high halves with two in-lane
 * shuffles, which permutes lanes; loading windows in the order `pair` makes the result come out in order. */
enum { ORDER_PLAIN, ORDER_PAIR, WINDOW_ORDERS };
static const uint8_t window_lanes[WINDOW_ORDERS][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}};
#define WINDOW_SHIFT(bits) (bits)

#include "cpu/windows.h"

typedef struct {
    const uint8_t *tile;
    const struct window_plan *plan;
    __m128i wrapped; /* stream bytes -4..11; kept in memory, where a load repeats it in both halves for free */
} tile_reader;

INLINE tile_reader tile_open(int rate2, const uint8_t *tile) {
    __m128i head = _mm_loadu_si128((const __m128i *)(const void *)tile);
    __m128i tail = _mm_loadu_si128((const __m128i *)(const void *)(tile + MM_TILE_BYTES(rate2) - 16));
    return (tile_reader){tile, &plans[rate2], _mm_alignr_epi8(head, tail, 12)};
}

/* 8 windows, one a lane. */
INLINE __m256i windows(const tile_reader *reader, int group, int order) {
    const struct window_plan *plan = reader->plan;
    const uint8_t *source = group < plan->wrapped_groups ? (const uint8_t *)&reader->wrapped
                                                         : reader->tile + plan->offset[group];
    __m128i bytes = _mm_loadu_si128((const __m128i *)(const void *)source);
    __m256i lanes = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(bytes),
                                        _mm256_load_si256((const __m256i *)(const void *)plan->shuffle[order][group]));
    lanes = _mm256_srlv_epi32(lanes, _mm256_load_si256((const __m256i *)(const void *)plan->shift[order][group & 1]));
    return _mm256_and_si256(lanes, _mm256_set1_epi32(0xFFFF));
}

/* Rounds to binary16 and back: the codebooks' one rounding. F16C ignores flush-to-zero, so subnormals survive. */
INLINE __m256 round_half(__m256 value) {
    return _mm256_cvtph_ps(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

/* Both codebooks' sums are exact in float (21 bits at most), so round_half is the only rounding. */
INLINE __m256 values_mul1(__m256i states, uint32_t multiplier) {
    __m256i words = _mm256_mullo_epi32(states, _mm256_set1_epi32((int)multiplier));
    __m256i pairs = _mm256_maddubs_epi16(words, _mm256_set1_epi8(1));
    __m256 sums = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    return round_half(_mm256_fmadd_ps(sums, _mm256_set1_ps(MM_MUL1_SCALE),
                                      _mm256_set1_ps(1024.0f * MM_MUL1_SCALE + MM_MUL1_BIAS)));
}

INLINE __m256 values_pair(__m256i states, uint32_t multiplier, uint32_t addend) {
    __m256i words = _mm256_mullo_epi32(states, _mm256_set1_epi32((int)multiplier));
    if (addend) words = _mm256_add_epi32(words, _mm256_set1_epi32((int)addend));
    words = _mm256_and_si256(words, _mm256_set1_epi32((int)MM_PAIR_AND));
    words = _mm256_xor_si256(words, _mm256_set1_epi32((int)MM_PAIR_XOR));
    __m256 low_lanes = _mm256_cvtph_ps(_mm256_castsi256_si128(words));
    __m256 high_lanes = _mm256_cvtph_ps(_mm256_extracti128_si256(words, 1));
    return round_half(_mm256_add_ps(_mm256_shuffle_ps(low_lanes, high_lanes, 0x88),
                                    _mm256_shuffle_ps(low_lanes, high_lanes, 0xDD)));
}

INLINE vec8 tile_decode(const tile_reader *reader, int group, int codebook) {
    switch (codebook) {
#define X(id, name, multiplier, addend, half_rates)                                             \
    case id:                                                                                    \
        return (vec8)(id == MM_CODEBOOK_MUL1                                                    \
                          ? values_mul1(windows(reader, group, ORDER_PLAIN), multiplier)        \
                          : values_pair(windows(reader, group, ORDER_PAIR), multiplier, addend));
        MM_CODEBOOKS(X)
#undef X
    default:
        return (vec8){0};
    }
}

INLINE ivec8 round_values(vec8 v) { return (ivec8)_mm256_cvtps_epi32((__m256)v); } /* for int16.h */

static void load_half(float *out, const uint16_t *in, int64_t count) {
    int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)(in + i))));
    for (int64_t i = whole; i < count; i++) out[i] = _cvtsh_ss(in[i]);
}

static void store_half(uint16_t *out, const float *in, int64_t count) {
    int64_t whole = count / 8 * 8;
    for (int64_t i = 0; i < whole; i += 8)
        _mm_storeu_si128((__m128i *)(void *)(out + i),
                         _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    for (int64_t i = whole; i < count; i++) out[i] = (uint16_t)_cvtss_sh(in[i], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

/* Asked of the CPU itself: __builtin_cpu_supports needs a start-up routine that zig's runtime library lacks. `registers` are the
 * bits of XCR0: those that the system saves when it switches threads; `ebx` and `ecx` are those of CPUID's leaf 7. */
static bool cpu_has(unsigned registers, unsigned ebx, unsigned ecx) {
    unsigned a, b, c, d, saved, high;
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return false;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & registers) != registers) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx) == ebx && (c & ecx) == ecx;
}
#define SAVES_YMM 0x06u /* xmm and the upper halves of ymm */
#define SAVES_ZMM 0xE6u /* and mask registers, upper halves of zmm, zmm16 to zmm31 */

#include "cpu/kernels.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
