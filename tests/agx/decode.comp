#version 460
// The inner loop of multiply_rows (metal/product.h) with decode_states (metal/device.h), transcribed by hand to GLSL so that Mesa's
// compiler for Apple GPUs can compile and count it. Keep it beside the Metal text: same loads, shifts and sums. One iteration is a
// block of 128 inputs: 4 pairs of tiles, 64 weights a lane. Loops with constant bounds are written out, where Mesa would index
// registers at run time. Inputs come from device memory here, from threadgroup memory there: loads either way.
// -DK=2|3|4 bits   -DV=0 3inst, 1 mcg, 2 mul1   -DROWS=1|4|8
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require
layout(local_size_x = 1024) in;
layout(buffer_reference, std430, buffer_reference_align = 4) readonly buffer U32 { uint d[]; };
layout(buffer_reference, std430, buffer_reference_align = 2) readonly buffer U16 { uint16_t d[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer F32 { float d[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer F4 { vec4 d[]; };
layout(push_constant) uniform P { U32 words; F4 x; F32 o; uint blocks; uint pair_words; uint zero; } p;

uint shift_left(uint w, uint by) {
  [[unroll]] for (; by > 4; by -= 4) w = (w << 4) + p.zero;
  return (w << by) + p.zero;
}

float raw_value(uint16_t half_state) {
  uint state = uint(half_state);
#if V == 2
  uint word = state * 0x83DCD12Du;
  u16vec2 pairs = unpackUint2x16((word & 0x00FF00FFu) + ((word >> 8) & 0x00FF00FFu));
  return float(uint16BitsToHalf(pairs.x + pairs.y));
#else
#if V == 0
  uint word = state * 89226354u + 64248484u;
#else
  uint word = state * 0xCBAC1FEDu;
#endif
  f16vec2 parts = unpackFloat2x16((word & 0x8FFF8FFFu) ^ 0x3B603B60u);
  return float(parts.x + parts.y);
#endif
}

#define STEP(j)                                                                                                       \
  {                                                                                                                   \
    const int end = (j + 1) * K, i = (end - 1) / 16;                                                                  \
    if (j == 0 || i != (end - K - 1) / 16)                                                                            \
      window = shift_left(packUint2x16(u16vec2(halves[i], i == 0 ? before : halves[max(i - 1, 0)])), end - 16 * i);   \
    else                                                                                                              \
      window = shift_left(window, K);                                                                                 \
    states[j] = unpackUint2x16(window).y;                                                                             \
  }
#define PART(part, sum, pair_x)                                                                                              \
  {                                                                                                                   \
    float a = raw_value(states[4 * part]), b = raw_value(states[4 * part + 1]);                                       \
    float c = raw_value(states[4 * part + 2]), d = raw_value(states[4 * part + 3]);                                   \
    [[unroll]] for (int r = 0; r < ROWS; r++) {                                                                       \
      vec4 v = F4(uint64_t(p.x) + pair_x).d[x + r * 32 + part / 2];                                                                         \
      sum[r] += a * v.x + b * v.y + c * v.z + d * v.w;                                                                \
    }                                                                                                                 \
  }
#if K % 2 == 0
#define LOAD(i) { u16vec2 word = unpackUint2x16(words.d[own + (i) / 2]); halves[i] = (i) % 2 == 0 ? word.y : word.x; }
#else
#define LOAD(i) halves[i] = shorts.d[odd##i];
#endif
#if K == 2
#define LOADS LOAD(0) LOAD(1)
#elif K == 3
#define LOADS LOAD(0) LOAD(1) LOAD(2)
#else
#define LOADS LOAD(0) LOAD(1) LOAD(2) LOAD(3)
#endif
// The pair's base addresses are the same for all lanes, so they live in uniform registers and cost nothing here.
#define PAIR(pair)                                                                                                    \
  {                                                                                                                   \
    U32 words = U32(uint64_t(p.words) + pair * 4ul * p.pair_words);                                                   \
    U16 shorts = U16(uint64_t(p.words) + pair * 4ul * p.pair_words);                                                  \
    uint16_t halves[K], states[16], before = shorts.d[wrapped];                                                     \
    uint window;                                                                                                      \
    LOADS                                                                                                             \
    STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7)                                                   \
    STEP(8) STEP(9) STEP(10) STEP(11) STEP(12) STEP(13) STEP(14) STEP(15)                                             \
    PART(0, low, pair * 128ul) PART(1, high, pair * 128ul) PART(2, low, pair * 128ul) PART(3, high, pair * 128ul)                                                            \
  }

void main() {
  uint lane = gl_LocalInvocationID.x & 31, m = lane & 15, tile = (lane >> 4) * (p.pair_words / 2), x = (lane >> 4) * 4 + (lane & 1) * 2;
  float low[ROWS], high[ROWS];
  [[unroll]] for (int r = 0; r < ROWS; r++) low[r] = high[r] = 0.0;
  uint wrapped = 2 * tile + (((m * K + 16 * K - 1) % (16 * K)) ^ 1);
#if K % 2 == 0
  uint own = tile + m * (K / 2);
#else
  uint odd0 = 2 * tile + ((m * K) ^ 1), odd1 = 2 * tile + ((m * K + 1) ^ 1), odd2 = 2 * tile + ((m * K + 2) ^ 1);
#endif
  [[dont_unroll]] for (uint block = 0; block < p.blocks; block++) {
    PAIR(0) PAIR(1) PAIR(2) PAIR(3)
    wrapped += 8 * p.pair_words;
#if K % 2 == 0
    own += 4 * p.pair_words;
#else
    odd0 += 8 * p.pair_words;
    odd1 += 8 * p.pair_words;
    odd2 += 8 * p.pair_words;
#endif
  }
  [[unroll]] for (int r = 0; r < ROWS; r++) p.o.d[gl_GlobalInvocationID.x * ROWS + r] = low[r] + high[r];
}
