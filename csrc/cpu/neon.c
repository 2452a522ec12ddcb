/* The NEON levels, for every arm64 CPU (Armv8.0 has all that they use). In floats: 8 trellis positions at a time in two registers,
 * windows by table lookup and per-lane shift (windows.h), half conversions in hardware. In 16-bit integers: int16.h. */
#if defined(__aarch64__) && defined(__ARM_NEON) && !defined(__AARCH64EB__)
#include <arm_neon.h>
#include <string.h>

#include "cpu/vector.h"

#include "cpu/half.h"

#include "cpu/windows.h"

#define LEVEL "neon"

typedef struct {
    const uint8_t *tile;
    const struct window_plan *plan;
    uint8x16_t wrapped; /* stream bytes -4..11 */
} tile_reader;

INLINE tile_reader tile_open(int rate2, const uint8_t *tile) {
    return (tile_reader){tile, &plans[rate2], vextq_u8(vld1q_u8(tile + MM_TILE_BYTES(rate2) - 16), vld1q_u8(tile), 12)};
}

/* The windows of 4 positions, one a lane; half 0 is positions 0..3 of the group, half 1 is 4..7. */
INLINE uint32x4_t windows(const tile_reader *reader, int group, int half) {
    const struct window_plan *plan = reader->plan;
    uint8x16_t bytes = group < plan->wrapped_groups ? reader->wrapped : vld1q_u8(reader->tile + plan->offset[group]);
    uint32x4_t lanes = vreinterpretq_u32_u8(vqtbl1q_u8(bytes, vld1q_u8(plan->shuffle[group] + 16 * half)));
    lanes = vshlq_u32(lanes, vld1q_s32(plan->shift[group & 1] + 4 * half));
    return vandq_u32(lanes, vdupq_n_u32(0xFFFF));
}

INLINE vec8 join(float32x4_t low, float32x4_t high) {
    vec8 both;
    memcpy(&both, &low, sizeof low);
    memcpy((char *)&both + sizeof low, &high, sizeof high);
    return both;
}

/* Rounds to binary16 and back: the codebooks' one rounding. FPCR's flush-to-zero bits, FZ and FZ16, do not touch
 * conversions to and from binary16, so subnormals survive. */
INLINE vec8 round_half(float32x4_t low, float32x4_t high) {
    float16x4_t narrow_low = vcvt_f16_f32(low), narrow_high = vcvt_f16_f32(high);
    return join(vcvt_f32_f16(narrow_low), vcvt_f32_f16(narrow_high));
}

/* Both codebooks' sums are exact in float (21 bits at most), so round_half is the only rounding. */
INLINE float32x4_t values_mul1(uint32x4_t states, uint32_t multiplier) {
    uint8x16_t words = vreinterpretq_u8_u32(vmulq_n_u32(states, multiplier));
    float32x4_t sums = vcvtq_f32_u32(vpaddlq_u16(vpaddlq_u8(words)));
    return vfmaq_n_f32(vdupq_n_f32(1024.0f * MM_MUL1_SCALE + MM_MUL1_BIAS), sums, MM_MUL1_SCALE);
}

/* A word's two halves lie side by side, and stay so when widened: a pairwise addition leaves the lanes in order.
 * (The high half is taken as integers because clang then folds the move into fcvtl2.) */
INLINE float32x4_t values_pair(uint32x4_t states, uint32_t multiplier, uint32_t addend) {
    uint32x4_t words = vmulq_n_u32(states, multiplier);
    if (addend) words = vaddq_u32(words, vdupq_n_u32(addend));
    uint16x8_t halves = vreinterpretq_u16_u32(words); /* both masks are the same for both halves */
    halves = veorq_u16(vandq_u16(halves, vdupq_n_u16(MM_PAIR_AND & 0xFFFF)), vdupq_n_u16(MM_PAIR_XOR & 0xFFFF));
    return vpaddq_f32(vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(halves))),
                      vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(halves))));
}

INLINE vec8 tile_decode(const tile_reader *reader, int group, int codebook) {
    uint32x4_t low = windows(reader, group, 0), high = windows(reader, group, 1);
    switch (codebook) {
#define X(id, name, multiplier, addend, half_rates)                                                              \
    case id:                                                                                                     \
        return id == MM_CODEBOOK_MUL1                                                                            \
                   ? round_half(values_mul1(low, multiplier), values_mul1(high, multiplier))                     \
                   : round_half(values_pair(low, multiplier, addend), values_pair(high, multiplier, addend));
        MM_CODEBOOKS(X)
#undef X
    default:
        return (vec8){0};
    }
}

static void load_half(float *out, const uint16_t *in, int64_t count) {
    int64_t whole = count / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4) vst1q_f32(out + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + i))));
    for (int64_t i = whole; i < count; i++) out[i] = mm_float_of_half(in[i]);
}

static void store_half(uint16_t *out, const float *in, int64_t count) {
    int64_t whole = count / 4 * 4;
    for (int64_t i = 0; i < whole; i += 4) vst1_u16(out + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(in + i))));
    for (int64_t i = whole; i < count; i++) out[i] = mm_half_of_float(in[i]);
}

#include "cpu/kernels.h"
#include "cpu/tiles.h"

/* ---- mul1 in 16-bit integers ---- */

#define INT16_LEVEL "neon-int16"
#define POSITIONS 32
#define MOST_ROWS 4
#define FUNNEL(before, after, shift) vsriq_n_u16(vshlq_n_u16(before, shift), after, 16 - (shift))
typedef uint16x8_t halves;
typedef int32x4_t sums32;

INLINE halves product_high(halves a, halves b) {
    uint32x4_t low = vmull_u16(vget_low_u16(a), vget_low_u16(b)), high = vmull_high_u16(a, b);
    return vuzp2q_u16(vreinterpretq_u16_u32(low), vreinterpretq_u16_u32(high));
}

INLINE halves sums_of_bytes(halves low, halves high) {
    return vpadalq_u8(vpaddlq_u8(vreinterpretq_u8_u16(low)), vreinterpretq_u8_u16(high));
}

INLINE void add_products(sums32 *sums, halves s, const int16_t *q, int step) {
    int16x8_t factors = vld1q_s16(q + step / 8 * 8), values = vreinterpretq_s16_u16(s);
    switch (step % 8) { /* by lane: one register of factors serves 8 steps */
#define CASE(lane)                                                                     \
    case lane:                                                                         \
        sums[0] = vmlal_laneq_s16(sums[0], vget_low_s16(values), factors, lane);       \
        sums[1] = vmlal_high_laneq_s16(sums[1], values, factors, lane);                \
        break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
#undef CASE
    default:
        break;
    }
}

INLINE ivec8 round_values(vec8 v) {
    float32x4_t halved[2];
    memcpy(halved, &v, sizeof v);
    int32x4_t rounded[2] = {vcvtnq_s32_f32(halved[0]), vcvtnq_s32_f32(halved[1])};
    ivec8 both;
    memcpy(&both, rounded, sizeof both);
    return both;
}

INLINE void order_tile(int16_t *q, ivec8 first, ivec8 second) { /* 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 */
    int32x4_t v[4];
    memcpy(v, &first, sizeof first);
    memcpy(v + 2, &second, sizeof second);
    int32x4_t low = vreinterpretq_s32_s16(vmovn_high_s32(vmovn_s32(v[0]), v[1]));
    int32x4_t high = vreinterpretq_s32_s16(vmovn_high_s32(vmovn_s32(v[2]), v[3]));
    vst1q_s16(q, vreinterpretq_s16_s32(vzip1q_s32(low, high)));
    vst1q_s16(q + 8, vreinterpretq_s16_s32(vzip2q_s32(low, high)));
}

#include "cpu/gather_neon.h"
#include "cpu/int16.h"

const struct mm_kernels *mm_kernels_neon(void) { return &kernels; }
const struct mm_kernels *mm_kernels_neon_int16(void) { return &kernels_int16; }
#else
#include "cpu/cpu.h"
const struct mm_kernels *mm_kernels_neon(void) { return 0; }
const struct mm_kernels *mm_kernels_neon_int16(void) { return 0; }
#endif
