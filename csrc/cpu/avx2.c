/* The AVX2 level (with FMA and F16C): 8 trellis positions at a time, windows by byte shuffle and per-lane shift
 * (windows.h). Compiled for AVX2 whatever the build's flags, and used only where the CPU has it. */
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <cpuid.h>

#include "cpu/vector.h"

/* 3inst and mcg widen each half of a lane with two conversions and gather low and high halves with two in-lane
 * shuffles, which permutes lanes; loading windows in the order `pair` makes the result come out in order. */
enum { ORDER_PLAIN, ORDER_PAIR, WINDOW_ORDERS };
static const uint8_t window_lanes[WINDOW_ORDERS][8] = {{0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7}};
#define WINDOW_SHIFT(bits) (bits)

#include "cpu/windows.h"

#define LEVEL "avx2"

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

#include "cpu/kernels.h"
#include "cpu/tiles.h"

/* ---- mul1 in 16-bit integers ---- */

#define INT16_LEVEL "avx2-int16"
typedef uint16_t half16 __attribute__((vector_size(32), may_alias));
#if defined(__clang__)
#define UNROLL(count) _Pragma("unroll")
#else
#define UNROLL_PRAGMA(text) _Pragma(#text)
#define UNROLL(count) UNROLL_PRAGMA(GCC unroll count)
#endif
/* Keeps the compiler from regrouping a long chain of sums into a tree that does not fit the registers (1.5 x slower). */
#define KEEP(vector) __asm__("" : "+x"(vector))

INLINE half16 multiply_high(half16 a, half16 b) { return (half16)_mm256_mulhi_epu16((__m256i)a, (__m256i)b); }

INLINE half16 byte_sums(half16 low, half16 high) {
    __m256i one = _mm256_set1_epi8(1);
    return (half16)_mm256_maddubs_epi16((__m256i)low, one) + (half16)_mm256_maddubs_epi16((__m256i)high, one);
}

INLINE ivec8 add_products(ivec8 sums, half16 s, int32_t pair) {
    return sums + (ivec8)_mm256_madd_epi16((__m256i)s, _mm256_set1_epi32(pair));
}

INLINE ivec8 round_values(vec8 v) { return (ivec8)_mm256_cvtps_epi32((__m256)v); }

#include "cpu/gather_avx2.h"
#include "cpu/int16.h"

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

/* Asked of the CPU itself: __builtin_cpu_supports needs a start-up routine that zig's runtime library lacks. */
static bool cpu_has_avx2(void) {
    unsigned eax, ebx, ecx, edx, saved_registers, high;
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & wanted) != wanted) return false;
    __asm__("xgetbv" : "=a"(saved_registers), "=d"(high) : "c"(0));
    if ((saved_registers & 6) != 6) return false; /* the system does not save xmm and ymm when it switches threads */
    return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (ebx & bit_AVX2);
}

const struct mm_kernels *mm_kernels_avx2(void) { return cpu_has_avx2() ? &kernels : 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return cpu_has_avx2() ? &kernels_int16 : 0; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx2(void) { return 0; }
const struct mm_kernels *mm_kernels_avx2_int16(void) { return 0; }
#endif
