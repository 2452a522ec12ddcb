/* The AVX2 level (with FMA and F16C): 8 trellis positions at a time. A byte shuffle brings each position's 3 stream bytes
 * into its 32-bit lane, a per-lane shift leaves the 16-bit window; that works for every rate, so only tables differ.
 * Compiled for AVX2 whatever the build's flags, and used only where the CPU has it. */
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include <assert.h>
#include <cpuid.h>
#include <stdalign.h>

#include "cpu/vector.h"

#include "cpu/cpu.h"

#define LEVEL "avx2"

/* How to cut one rate's windows out of a tile. The 16 loaded bytes start at offset[group], or for the first groups at
 * byte -4 of the circular stream. Lanes hold positions 0..7 in order, or as `pair_lane` says. */
struct window_plan {
    alignas(32) uint8_t shuffle[2][32][32]; /* [order][group]: bytes for _mm256_shuffle_epi8 */
    alignas(32) uint32_t shift[2][2][8];    /* [order][group parity] */
    uint8_t offset[32];
    int wrapped_groups; /* leading groups whose windows reach back over the tile's start: 1, or 2 at low rates */
};
enum { ORDER_PLAIN, ORDER_PAIR };

/* 3inst and mcg widen each half of a lane with two conversions and gather low and high halves with two in-lane
 * shuffles, which permutes lanes; loading position pair_lane[i] into lane i makes the result come out in order. */
static const uint8_t pair_lane[8] = {0, 1, 4, 5, 2, 3, 6, 7};

static struct window_plan plans[MM_MAX_RATE2 + 1];

static void plan_rate(struct window_plan *plan, int rate2) {
    int bytes = MM_TILE_BYTES(rate2);
    plan->wrapped_groups = 0;
    for (int group = 0; group < 32; group++) {
        int first_start = ((8 * group + 1) * rate2 >> 1) - MM_WINDOW_BITS;
        bool wrapped = first_start < 0;
        int base = wrapped ? -4 : (first_start / 8) & ~3;
        if (base > bytes - 16) base = bytes - 16; /* never read past the tile */
        plan->wrapped_groups += wrapped;
        plan->offset[group] = (uint8_t)(wrapped ? 0 : base);
        for (int order = 0; order < 2; order++)
            for (int lane = 0; lane < 8; lane++) {
                int position = 8 * group + (order == ORDER_PAIR ? pair_lane[lane] : lane);
                int start = ((position + 1) * rate2 >> 1) - MM_WINDOW_BITS;
                int byte = (start + 64) / 8 - 8, bit = (start + 64) % 8; /* rounds down, start >= -15 */
                plan->shift[order][group & 1][lane] = (uint32_t)(8 - bit);
                for (int i = 0; i < 4; i++) {
                    /* Little-endian lane: byte 2 is the window's first, byte 0 its third, needed unless aligned. */
                    bool used = i < 3 && !(i == 0 && bit == 0);
                    int source = ((byte + 2 - i + 4) ^ 3) - 4 - base; /* + 4 - 4 keeps the xor on whole words */
                    assert(!used || (source >= 0 && source < 16));
                    plan->shuffle[order][group][lane * 4 + i] = (uint8_t)(used ? source : 0x80);
                }
            }
    }
}

static void prepare(void) {
    for (int rate2 = MM_MIN_RATE2; rate2 <= MM_MAX_RATE2; rate2++) plan_rate(&plans[rate2], rate2);
}

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

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC reset_options
#endif

const struct mm_kernels *mm_kernels_avx2(void) {
    unsigned eax, ebx, ecx, edx;
    bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
    return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : 0;
}
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_avx2(void) { return 0; }
#endif
