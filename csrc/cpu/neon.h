/* The body of the NEON levels: exact values in panels whose lanes are columns (columns.h), and mul1 in integers (int16.h). Included by a
 * level's file after <arm_neon.h>, whose functions have targets of their own. The file defines LEVEL, and may define
 *   HALF_ARITHMETIC     the CPU has arithmetic on binary16 (Armv8.2's FEAT_FP16)
 *   SHA3_TARGET         columns.h; its exclusive or of masked words is one instruction
 *   INT16_LEVEL, or INT8_LEVEL and OWN_ROW8    int16.h */
#include "cpu/vector.h"

#include "cpu/half.h"

typedef uint16x8_t halves;
#define FUNNEL(before, after, shift) vsriq_n_u16(vshlq_n_u16(before, shift), after, 16 - (shift))

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

INLINE wide wide_of_halves(const uint16_t *in) {
    float32x4_t halved[2] = {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in))), vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(in + 4)))};
    wide both;
    memcpy(&both, halved, sizeof both);
    return both;
}

#include "cpu/kernels.h"
#include "cpu/gather_neon.h"

/* ---- exact, in float32 ---- */

static void prepare(void) { /* no tables */
#ifdef HALF_ARITHMETIC
    has_sha3 = arm_has_sha3();
    has_i8mm = arm_has_i8mm();
#endif
}

/* 8 products of 32 bits: a lane's four bytes lie side by side, and so do its halves. */
INLINE void multiply_states(uint32x4_t *words, halves states, uint32_t multiplier) {
    words[0] = vmulq_n_u32(vmovl_u16(vget_low_u16(states)), multiplier);
    words[1] = vmulq_n_u32(vmovl_high_u16(states), multiplier);
}

INLINE halves byte_sums(const uint32x4_t *words) {
    return vpaddq_u16(vpaddlq_u8(vreinterpretq_u8_u32(words[0])), vpaddlq_u8(vreinterpretq_u8_u32(words[1])));
}

/* Conversions from and to binary16 keep subnormals whatever FPCR's flush-to-zero bits, FZ and FZ16, say, and its sums here are never
 * subnormal: a sum of 3inst or mcg is a multiple of 2^-13, and one of mul1 no nearer to 0 than 0.0018. */
INLINE void floats_of_halves(float32x4_t *out, halves values) {
    float16x8_t v = vreinterpretq_f16_u16(values);
    out[0] = vcvt_f32_f16(vget_low_f16(v));
    out[1] = vcvt_high_f32_f16(v);
}

#ifdef HALF_ARITHMETIC

/* The format's own arithmetic: two binary16 numbers added, or one multiply-add, rounded once. By hand: zig 0.17's
 * headers have intrinsics on binary16 only where a whole file is compiled for them. */
INLINE void values_of_states(float32x4_t *out, halves states, uint32_t multiplier, uint32_t addend, int codebook, bool sha3) {
    uint32x4_t words[2];
    halves value;
    multiply_states(words, states, multiplier);
    if (codebook == MM_CODEBOOK_MUL1) { /* the bits 0x6400 + S are the number 1024 + S, S being at most 1020 */
        halves sums = byte_sums(words);
        const halves scale = vdupq_n_u16(mm_half_of_float(MM_MUL1_SCALE));
        value = vdupq_n_u16(mm_half_of_float(MM_MUL1_BIAS));
        __asm__("fmla %0.8h, %1.8h, %2.8h" : "+w"(value) : "w"(vaddq_u16(sums, vdupq_n_u16(0x6400))), "w"(scale));
    } else {
        for (int i = 0; i < 2; i++) {
            const uint32x4_t kept = vdupq_n_u32(MM_PAIR_AND), flip = vdupq_n_u32(MM_PAIR_XOR);
            if (addend) words[i] = vaddq_u32(words[i], vdupq_n_u32(addend));
            if (sha3) /* the directive: without optimization this stands where it is not run, in functions for less */
                __asm__(".arch_extension sha3\n\tbcax %0.16b, %1.16b, %0.16b, %2.16b" : "+w"(words[i]) : "w"(flip), "w"(vmvnq_u32(kept)));
            else
                words[i] = veorq_u32(vandq_u32(words[i], kept), flip);
        }
        __asm__("faddp %0.8h, %1.8h, %2.8h" : "=w"(value) : "w"(words[0]), "w"(words[1]));
    }
    floats_of_halves(out, value);
}

#else

/* Both codebooks' sums are exact in float (21 bits at most), so the conversion to binary16 is the only rounding. */
INLINE void values_of_states(float32x4_t *out, halves states, uint32_t multiplier, uint32_t addend, int codebook, bool sha3) {
    uint32x4_t words[2];
    float32x4_t exact[2];
    (void)sha3;
    multiply_states(words, states, multiplier);
    if (codebook == MM_CODEBOOK_MUL1) { /* the bits 0x6400 + S are the binary16 number 1024 + S, S being at most 1020 */
        halves sums = byte_sums(words);
        floats_of_halves(exact, vaddq_u16(sums, vdupq_n_u16(0x6400)));
        for (int i = 0; i < 2; i++) exact[i] = vfmaq_n_f32(vdupq_n_f32(MM_MUL1_BIAS), exact[i], MM_MUL1_SCALE);
    } else
        for (int i = 0; i < 2; i++) { /* a word's two halves stay side by side when widened: pairwise addition keeps the order */
            float32x4_t parts[2];
            if (addend) words[i] = vaddq_u32(words[i], vdupq_n_u32(addend));
            words[i] = veorq_u32(vandq_u32(words[i], vdupq_n_u32(MM_PAIR_AND)), vdupq_n_u32(MM_PAIR_XOR));
            floats_of_halves(parts, vreinterpretq_u16_u32(words[i]));
            exact[i] = vpaddq_f32(parts[0], parts[1]);
        }
    floats_of_halves(out, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(exact[0]), exact[1])));
}

#endif

#include "cpu/columns.h"

/* ---- mul1 in integers ---- */

#define POSITIONS 32
#define MOST_ROWS 4
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

INLINE iwide larger(iwide a, iwide b) {
    int32x4_t v[2], w[2];
    memcpy(v, &a, sizeof a);
    memcpy(w, &b, sizeof b);
    for (int i = 0; i < 2; i++) v[i] = vmaxq_s32(v[i], w[i]);
    memcpy(&a, v, sizeof a);
    return a;
}

INLINE iwide round_values(wide v) {
    float32x4_t halved[2];
    memcpy(halved, &v, sizeof v);
    int32x4_t rounded[2] = {vcvtnq_s32_f32(halved[0]), vcvtnq_s32_f32(halved[1])};
    iwide both;
    memcpy(&both, rounded, sizeof both);
    return both;
}

INLINE void order_inputs(int16_t *q, const iwide *inputs) { /* 0 1 8 9 2 3 10 11 4 5 12 13 6 7 14 15 */
    for (int i = 0; i < WIDES; i += 2, q += MM_TILE) {
        int32x4_t v[4];
        memcpy(v, inputs + i, sizeof v);
        int32x4_t low = vreinterpretq_s32_s16(vmovn_high_s32(vmovn_s32(v[0]), v[1]));
        int32x4_t high = vreinterpretq_s32_s16(vmovn_high_s32(vmovn_s32(v[2]), v[3]));
        vst1q_s16(q, vreinterpretq_s16_s32(vzip1q_s32(low, high)));
        vst1q_s16(q + 8, vreinterpretq_s16_s32(vzip2q_s32(low, high)));
    }
}

#include "cpu/int16.h"
