/* What the levels for x86 share. Included once by a level's file, first of all; the file begins with BEGIN_TARGET and ends with END_TARGET,
 * between which all functions are compiled for that target, whatever the build's flags. It defines before:
 *   TARGET     the compiler's names of the instructions, with avx2, fma and f16c */
#include <assert.h>
#include <cpuid.h>
#include <immintrin.h>
#include <math.h>
#include <stdalign.h>

#include "cpu/cpu.h"
#include "cpu/half.h"
#include "cpu/target.h"
#include "cpu/vector.h"

#define BEGIN_TARGET COMPILE_FOR(TARGET, TARGET)

/* Asked of the CPU itself: __builtin_cpu_supports needs a start-up routine that zig's runtime library lacks. `registers` are the
 * bits of XCR0: those that the system saves when it switches threads; `ebx`, `ecx` and `edx` are those of CPUID's leaf 7. */
static bool cpu_has(unsigned registers, unsigned ebx, unsigned ecx, unsigned edx) {
    unsigned a, b, c, d, saved, high;
    const unsigned wanted = bit_FMA | bit_F16C | bit_AVX | bit_OSXSAVE;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & wanted) != wanted) return false;
    __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    if ((saved & registers) != registers) return false;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (b & ebx) == ebx && (c & ecx) == ecx && (d & edx) == edx;
}

INLINE bool cpu_has_avx_vnni(void) {
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 4 & 1;
}

#define SAVES_YMM 0x06u /* xmm and the upper halves of ymm */
#define SAVES_ZMM 0xE6u /* and mask registers, upper halves of zmm, zmm16 to zmm31 */
#define SAVES_TILES 0x60000u /* AMX's configuration and tiles */

BEGIN_TARGET

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

#if WIDE_LANES == 16
INLINE wide wide_of_halves(const uint16_t *in) { return (wide)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)in)); }
#else
INLINE wide wide_of_halves(const uint16_t *in) { return (wide)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)in)); }
#endif

#include "cpu/kernels.h"

/* For int16.h, 16 positions: the inputs' order is 0 4 1 5 8 12 9 13 2 6 3 7 10 14 11 15. */
#if WIDE_LANES == 16
INLINE iwide larger(iwide a, iwide b) { return (iwide)_mm512_max_epi32((__m512i)a, (__m512i)b); }

INLINE iwide round_values(wide v) { return (iwide)_mm512_cvtps_epi32((__m512)v); }

INLINE void order_inputs(int16_t *q, const iwide *inputs) {
    /* Two tiles at a time: packed, 4 of one and 4 of the other in turn */
#define ORDER(first) first, first + 8, first + 1, first + 9, first + 16, first + 24, first + 17, first + 25, \
    first + 2, first + 10, first + 3, first + 11, first + 18, first + 26, first + 19, first + 27
    static const alignas(64) uint16_t order[32] = {ORDER(0), ORDER(4)};
#undef ORDER
    for (int i = 0; i < WIDES; i += 2, q += 2 * MM_TILE) {
        __m512i packed = _mm512_packs_epi32((__m512i)inputs[i], (__m512i)inputs[i + 1]);
        _mm512_storeu_si512(q, _mm512_permutexvar_epi16(_mm512_load_si512(order), packed));
    }
}
#else
INLINE iwide larger(iwide a, iwide b) { return (iwide)_mm256_max_epi32((__m256i)a, (__m256i)b); }

INLINE iwide round_values(wide v) { return (iwide)_mm256_cvtps_epi32((__m256)v); }

INLINE void order_inputs(int16_t *q, const iwide *inputs) {
    const __m128i by_step = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15); /* 0 4 1 5 2 6 3 7 */
    for (int i = 0; i < WIDES; i += 2, q += MM_TILE) {
        const __m256i first = (__m256i)inputs[i], second = (__m256i)inputs[i + 1];
        __m128i low = _mm_packs_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1));
        __m128i high = _mm_packs_epi32(_mm256_castsi256_si128(second), _mm256_extracti128_si256(second, 1));
        low = _mm_shuffle_epi8(low, by_step);
        high = _mm_shuffle_epi8(high, by_step);
        _mm_storeu_si128((__m128i *)(void *)q, _mm_unpacklo_epi64(low, high));
        _mm_storeu_si128((__m128i *)(void *)(q + 8), _mm_unpackhi_epi64(low, high));
    }
}
#endif

/* A row's next pair of words, or four bytes, which all dwords share. */
INLINE int32_t dword_at(const void *inputs) {
    int32_t dword;
    memcpy(&dword, inputs, sizeof dword);
    return dword;
}

INLINE vec8 add_pairs(vec8 a, vec8 b) { return (vec8)_mm256_hadd_ps((__m256)a, (__m256)b); }

END_TARGET
