/* AVX-VNNI, AVX-512 and AMX for CPUs that end at AVX2: every intrinsic of 512 bits in csrc/cpu and every name of cpu/x86_asm.h, computed as
 * Intel's manual says, in C and AVX2. So the very text of avx_vnni.c, avx512.h, gather_avx512.h and amx.h runs on any x86-64 CPU with AVX2
 * (test_levels.py). That shows what the kernels compute, not that a compiler or an assembler knows their instructions, and nothing of
 * their speed.
 *   cc -std=c11 -O1 -mavx2 -mfma -mf16c -Wno-psabi -include tests/emulated_avx512.h -Icsrc tests/levels.c csrc/cpu/[a-z]*.c -lm -o levels
 * Functions are not inlined: that takes half the time to compile. An intrinsic that is missing here does not compile. */
#define MM_EMULATED_AVX512
#if !defined(__AVX2__) || !defined(__FMA__) || !defined(__F16C__)
#error "compile for x86-64 with -mavx2 -mfma -mf16c"
#endif
#if !defined(__clang__) && __GNUC__ < 12 || defined(__clang__) && __clang_major__ < 14
#error "gcc 12 or clang 14 is needed, as for avx512_fp16.c"
#endif
#ifndef _DEFAULT_SOURCE
#define _DEFAULT_SOURCE /* what the files themselves ask for comes after these headers */
#endif
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EMULATED static __attribute__((noinline, unused))
typedef union {
    __m512i whole;
    __m256i half[2];
    uint16_t words[32];
    int32_t dwords[16];
    uint8_t bytes[64];
} emulated_zmm;

/* ---- the CPU ---- */

#define AVX512_TARGET "avx2,fma,f16c"
#define HAS_AVX_VNNI cpu_has(SAVES_YMM, bit_AVX2, 0, 0)
#define HAS_AVX512(edx) cpu_has(SAVES_YMM, bit_AVX2, 0, 0 * (edx))
#define HAS_AMX true

/* ---- intrinsics ---- */

/* What AVX2 does to each half. */
#define EMULATED_HALVES(name, intrinsic)                               \
    EMULATED __m512i name(__m512i a, __m512i b) {                      \
        emulated_zmm x = {a}, y = {b};                                 \
        for (int i = 0; i < 2; i++) x.half[i] = intrinsic(x.half[i], y.half[i]); \
        return x.whole;                                                \
    }
EMULATED_HALVES(emulated_mulhi_epu16, _mm256_mulhi_epu16)
EMULATED_HALVES(emulated_maddubs_epi16, _mm256_maddubs_epi16)
EMULATED_HALVES(emulated_unpacklo_epi16, _mm256_unpacklo_epi16)
EMULATED_HALVES(emulated_unpackhi_epi16, _mm256_unpackhi_epi16)

EMULATED_HALVES(emulated_max_epi32, _mm256_max_epi32)
EMULATED_HALVES(emulated_packs_epi32, _mm256_packs_epi32)

EMULATED __m512i emulated_shldi_epi16(__m512i a, __m512i b, int count) {
    emulated_zmm x = {a}, y = {b};
    for (int i = 0; i < 2; i++)
        x.half[i] = _mm256_or_si256(_mm256_slli_epi16(x.half[i], count & 15), _mm256_srli_epi16(y.half[i], 16 - (count & 15)));
    return x.whole;
}

EMULATED __m512i emulated_mask_permutexvar_epi8(__m512i source, uint64_t mask, __m512i index, __m512i a) {
    emulated_zmm out = {source}, at = {index}, from = {a};
    for (int i = 0; i < 64; i++)
        if (mask >> i & 1) out.bytes[i] = from.bytes[at.bytes[i] & 63];
    return out.whole;
}

EMULATED __m512i emulated_permutexvar_epi16(__m512i index, __m512i a) {
    emulated_zmm out, at = {index}, from = {a};
    for (int i = 0; i < 32; i++) out.words[i] = from.words[at.words[i] & 31];
    return out.whole;
}

EMULATED uint32_t emulated_cmplt_epu16_mask(__m512i a, __m512i b) {
    emulated_zmm x = {a}, y = {b};
    uint32_t mask = 0;
    for (int i = 0; i < 32; i++) mask |= (uint32_t)(x.words[i] < y.words[i]) << i;
    return mask;
}

EMULATED __m512i emulated_mask_add_epi16(__m512i source, uint32_t mask, __m512i a, __m512i b) {
    emulated_zmm out = {source}, x = {a}, y = {b};
    for (int i = 0; i < 32; i++)
        if (mask >> i & 1) out.words[i] = (uint16_t)(x.words[i] + y.words[i]);
    return out.whole;
}

EMULATED __m512i emulated_set1_epi32(int32_t value) {
    emulated_zmm out;
    out.half[0] = out.half[1] = _mm256_set1_epi32(value);
    return out.whole;
}

EMULATED __m512d emulated_set1_pd(double value) {
    emulated_zmm out;
    out.half[0] = out.half[1] = _mm256_castpd_si256(_mm256_set1_pd(value));
    return (__m512d)out.whole;
}

EMULATED void emulated_storeu_si512(void *to, __m512i a) { memcpy(to, &a, sizeof a); }

EMULATED __m512i emulated_loadu_si512(const void *from) {
    emulated_zmm out;
    memcpy(&out, from, sizeof out);
    return out.whole;
}

EMULATED __m512i emulated_load_si512(const void *from) {
    if ((uintptr_t)from % 64) fputs("an aligned load from elsewhere\n", stderr), abort();
    return emulated_loadu_si512(from);
}

EMULATED __m256i emulated_extracti64x4_epi64(__m512i a, int half) { return ((emulated_zmm){a}).half[half]; }

EMULATED __m512 emulated_cvtph_ps(__m256i a) {
    union {
        __m256 half[2];
        __m512 whole;
    } out = {{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
    return out.whole;
}

EMULATED __m512i emulated_cvtps_epi32(__m512 a) {
    __m256 halves[2];
    emulated_zmm out;
    memcpy(halves, &a, sizeof a);
    for (int i = 0; i < 2; i++) out.half[i] = _mm256_cvtps_epi32(halves[i]);
    return out.whole;
}

EMULATED __m512 emulated_cvtepi32_ps(__m512i a) {
    emulated_zmm x = {a};
    union {
        __m256 half[2];
        __m512 whole;
    } out = {{_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1])}};
    return out.whole;
}

EMULATED __m512 emulated_shuffle_f32x4(__m512 a, __m512 b, int selected) {
    float from[2][4][4], out[4][4];
    memcpy(from[0], &a, sizeof from[0]);
    memcpy(from[1], &b, sizeof from[1]);
    for (int i = 0; i < 4; i++) memcpy(out[i], from[i / 2][selected >> 2 * i & 3], sizeof out[i]);
    memcpy(&a, out, sizeof out);
    return a;
}

/* Macros in some headers. */
#undef _mm512_shldi_epi16
#undef _mm512_extracti64x4_epi64
#undef _mm512_shuffle_f32x4
#undef _mm512_cmplt_epu16_mask

#define _mm512_mulhi_epu16 emulated_mulhi_epu16
#define _mm512_maddubs_epi16 emulated_maddubs_epi16
#define _mm512_unpacklo_epi16 emulated_unpacklo_epi16
#define _mm512_unpackhi_epi16 emulated_unpackhi_epi16
#define _mm512_max_epi32 emulated_max_epi32
#define _mm512_cvtps_epi32 emulated_cvtps_epi32
#define _mm512_packs_epi32 emulated_packs_epi32
#define _mm512_storeu_si512 emulated_storeu_si512
#define _mm512_shldi_epi16 emulated_shldi_epi16
#define _mm512_mask_permutexvar_epi8 emulated_mask_permutexvar_epi8
#define _mm512_permutexvar_epi8(index, a) emulated_mask_permutexvar_epi8(a, ~UINT64_C(0), index, a)
#define _mm512_permutexvar_epi16 emulated_permutexvar_epi16
#define _mm512_cmplt_epu16_mask emulated_cmplt_epu16_mask
#define _mm512_mask_add_epi16 emulated_mask_add_epi16
#define _mm512_set1_epi32 emulated_set1_epi32
#define _mm512_set1_epi16(value) emulated_set1_epi32((uint16_t)(value) * 0x10001)
#define _mm512_set1_epi8(value) emulated_set1_epi32((uint8_t)(value) * 0x1010101)
#define _mm512_set1_pd emulated_set1_pd
#define _mm512_loadu_si512 emulated_loadu_si512
#define _mm512_load_si512 emulated_load_si512
#define _mm512_castpd_ps(a) ((__m512)(a))
#define _mm512_castsi512_si256(a) emulated_extracti64x4_epi64(a, 0)
#define _mm512_extracti64x4_epi64 emulated_extracti64x4_epi64
#define _mm512_cvtph_ps emulated_cvtph_ps
#define _mm512_cvtepi32_ps emulated_cvtepi32_ps
#define _mm512_shuffle_f32x4 emulated_shuffle_f32x4

/* ---- instructions: VNNI ---- */

EMULATED __m256i emulated_256_vpdpwssd(__m256i sums, __m256i a, __m256i b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }

/* In dwords: maddubs would saturate. */
EMULATED __m256i emulated_256_vpdpbusd(__m256i sums, __m256i a, __m256i b) {
    const __m256i low = _mm256_set1_epi16(255);
    __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
    __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, low), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
    return _mm256_add_epi32(sums, _mm256_add_epi32(odd, even));
}

#define EMULATED_MULTIPLY_ADD(name)                                                                             \
    EMULATED __m512i emulated_##name(__m512i sums, __m512i a, __m512i b) {                                      \
        emulated_zmm out = {sums}, x = {a}, y = {b};                                                            \
        for (int i = 0; i < 2; i++) out.half[i] = emulated_256_##name(out.half[i], x.half[i], y.half[i]);       \
        return out.whole;                                                                                       \
    }
EMULATED_MULTIPLY_ADD(vpdpwssd)
EMULATED_MULTIPLY_ADD(vpdpbusd)

#define VEX_VPDPWSSD(sums, a, b) ((sums) = (__typeof__(sums))emulated_256_vpdpwssd((__m256i)(sums), (__m256i)(a), (__m256i)(b)))
#define VEX_VPDPBUSD(sums, a, b) ((sums) = (__typeof__(sums))emulated_256_vpdpbusd((__m256i)(sums), (__m256i)(a), (__m256i)(b)))
#define VPDPWSSD(sums, a, b) ((sums) = (__typeof__(sums))emulated_vpdpwssd((__m512i)(sums), (__m512i)(a), (__m512i)(b)))
#define VPDPBUSD(sums, a, b) ((sums) = (__typeof__(sums))emulated_vpdpbusd((__m512i)(sums), (__m512i)(a), (__m512i)(b)))

/* ---- instructions: binary16 ---- */

/* v rounded to 11 bits, or to a multiple of 2^-24, so that what converts it next is exact: 1.5 * 2^52 units are added and taken away. */
static inline float emulated_half_precision(double v) {
    union {
        double value;
        uint64_t bits;
    } unit = {v};
    uint64_t exponent = unit.bits >> 52 & 0x7FF;
    if (exponent < 1023 - 14) exponent = 1023 - 14;
    unit.bits = (exponent - 10 + 52) << 52 | UINT64_C(1) << 51;
    return (float)(v + unit.value - unit.value);
}

/* a * b + c, rounded once. Finite numbers only, and in double exact: 22 bits of a product, 11 of c, which are to lie within 53. */
EMULATED __m512i emulated_multiply_add_ph(__m512i a, __m512i b, __m512i c) {
    emulated_zmm x[3] = {{a}, {b}, {c}}, out;
    for (int i = 0; i < 4; i++) {
        float v[3][8], sum[8];
        for (int k = 0; k < 3; k++) {
            __m128i words;
            memcpy(&words, x[k].words + 8 * i, sizeof words);
            _mm256_storeu_ps(v[k], _mm256_cvtph_ps(words));
        }
        for (int k = 0; k < 8; k++) sum[k] = emulated_half_precision((double)v[0][k] * (double)v[1][k] + (double)v[2][k]);
        __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(sum), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        memcpy(out.words + 8 * i, &rounded, sizeof rounded);
    }
    return out.whole;
}

#define VFMADD213PH(a, b, c) ((a) = emulated_multiply_add_ph(a, (__m512i)(b), (__m512i)(c)))
#define VADDPH(sum, a, b) ((sum) = emulated_multiply_add_ph((__m512i)(a), _mm512_set1_epi16(0x3C00), (__m512i)(b)))

/* the nearest integers, in the middle the even ones */
EMULATED __m512i emulated_words_of_ph(__m512i a) {
    emulated_zmm in = {a}, out;
    for (int i = 0; i < 4; i++) {
        __m128i words, rounded;
        memcpy(&words, in.words + 8 * i, sizeof words);
        __m256i dwords = _mm256_cvtps_epi32(_mm256_cvtph_ps(words));
        rounded = _mm_packs_epi32(_mm256_castsi256_si128(dwords), _mm256_extracti128_si256(dwords, 1));
        memcpy(out.words + 8 * i, &rounded, sizeof rounded);
    }
    return out.whole;
}
#define VCVTPH2W(words, a) ((words) = emulated_words_of_ph((__m512i)(a)))

/* ---- instructions: tiles of a thread, always 64 bytes wide ---- */

static _Thread_local struct {
    int rows[8]; /* 0: not configured */
    uint8_t bytes[8][16][64];
} emulated_tiles __attribute__((unused));

static inline void emulated_rule(int good, const char *broken) { /* as an invalid opcode ends the process on a CPU */
    if (!good) fprintf(stderr, "AMX: %s\n", broken), abort();
}

EMULATED void emulated_ldtilecfg(const void *config) {
    const uint8_t *bytes = config;
    emulated_rule(bytes[0] == 1 && !bytes[1], "palette or start row");
    for (int tile = 0; tile < 8; tile++) {
        emulated_rule(bytes[16 + 2 * tile] == 64 && !bytes[17 + 2 * tile], "the emulation has 64 bytes in a row");
        emulated_rule(bytes[48 + tile] && bytes[48 + tile] <= 16, "rows of a tile");
        emulated_tiles.rows[tile] = bytes[48 + tile];
    }
    memset(emulated_tiles.bytes, 0, sizeof emulated_tiles.bytes);
}

EMULATED void emulated_tilerelease(void) { memset(&emulated_tiles, 0, sizeof emulated_tiles); }

EMULATED void emulated_tilezero(int tile) {
    emulated_rule(emulated_tiles.rows[tile], "a tile without configuration");
    memset(emulated_tiles.bytes[tile], 0, sizeof emulated_tiles.bytes[tile]);
}

EMULATED void emulated_tileloadd(int tile, const void *from, int64_t stride) {
    emulated_tilezero(tile);
    for (int i = 0; i < emulated_tiles.rows[tile]; i++)
        memcpy(emulated_tiles.bytes[tile][i], (const char *)from + i * stride, sizeof emulated_tiles.bytes[tile][i]);
}

EMULATED void emulated_tilestored(void *to, int64_t stride, int tile) {
    emulated_rule(emulated_tiles.rows[tile], "a tile without configuration");
    for (int i = 0; i < emulated_tiles.rows[tile]; i++)
        memcpy((char *)to + i * stride, emulated_tiles.bytes[tile][i], sizeof emulated_tiles.bytes[tile][i]);
}

/* tdpbsud and, with 0x80 for `sign`, tdpbssd. sums [m, n] += inputs [m, 4 k + i] * weights [k, 4 n + i], a row of sums one register: vpdpbusd with one
 * dword of inputs. A signed byte w is the unsigned w + 128, or w ^ 0x80, less 128. */
EMULATED void emulated_tdp(int sums, int inputs, int weights, int sign) {
    emulated_rule(emulated_tiles.rows[sums] && emulated_tiles.rows[sums] == emulated_tiles.rows[inputs], "rows of sums and inputs");
    emulated_rule(emulated_tiles.rows[weights] == 16, "rows of weights");
    emulated_rule(sums != inputs && sums != weights && inputs != weights, "a tile named twice");
    for (int m = 0; m < emulated_tiles.rows[sums]; m++) {
        uint8_t(*row)[64] = &emulated_tiles.bytes[sums][m];
        __m512i sum = emulated_loadu_si512(row);
        for (int k = 0; k < 16; k++) {
            int32_t four;
            memcpy(&four, emulated_tiles.bytes[inputs][m] + 4 * k, sizeof four);
            __m512i unsigned_bytes = emulated_loadu_si512(emulated_tiles.bytes[weights][k]), x = emulated_set1_epi32(four);
            if (sign) {
                emulated_zmm flipped = {unsigned_bytes}, less = {emulated_vpdpbusd(emulated_set1_epi32(0), emulated_set1_epi32((int)0x80808080), x)}, out = {sum};
                for (int i = 0; i < 64; i++) flipped.bytes[i] ^= 0x80;
                for (int i = 0; i < 16; i++) out.dwords[i] -= less.dwords[i];
                sum = out.whole, unsigned_bytes = flipped.whole;
            }
            sum = emulated_vpdpbusd(sum, unsigned_bytes, x);
        }
        memcpy(row, &sum, sizeof sum);
    }
}

#define TILE_CONFIGURE(config) emulated_ldtilecfg(&(config))
#define TILE_RELEASE() emulated_tilerelease()
#define TILE_ZERO(tile) emulated_tilezero(tile)
#define TILE_LOAD(tile, from, stride) emulated_tileloadd(tile, from, stride)
#define TILE_STORE(to, stride, tile) emulated_tilestored(to, stride, tile)
#define TILE_MULTIPLY_UNSIGNED(sums, inputs, weights) emulated_tdp(sums, inputs, weights, 0)
#define TILE_MULTIPLY_SIGNED(sums, inputs, weights) emulated_tdp(sums, inputs, weights, 0x80)
