#version 460
// The inner loop of multiply_rows (metal/product.h) with load_stream, next_state and raw_value (metal/device.h), transcribed by
// hand to GLSL so that Mesa's compiler for Apple GPUs can compile and count it. Keep it beside the Metal text: same loads, shifts and
// sums. One iteration is a block of 128 inputs: 2 times 4 tiles, 64 weights a lane. Loops with constant bounds are written out,
// where Mesa would index registers at run time. Inputs come from device memory here, from threadgroup memory there: loads either
// way, with constant offsets that cost nothing (there in the instruction, here in a base address that all lanes share).
// -DK=2|3|4 bits, or -DRATE2=3|5|7 half bits   -DV=0 3inst, 1 mcg, 2 mul1   -DROWS=1|2|4|8
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types_int64 : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_control_flow_attributes : require
#ifndef RATE2
#define RATE2 (2 * K)
#endif
layout(local_size_x = 1024) in;
layout(buffer_reference, std430, buffer_reference_align = 4) readonly buffer U32 { uint d[]; };
layout(buffer_reference, std430, buffer_reference_align = 2) readonly buffer U16 { uint16_t d[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer F32 { float d[]; };
layout(buffer_reference, std430, buffer_reference_align = 16) readonly buffer F4 { vec4 d[]; };
layout(push_constant) uniform P { U32 words; F4 x; F32 o; uint blocks; uint row_words; uint block_words; uint zero; } p;

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

// load_stream. 64-bit base, 32-bit offset: the form that a load takes.
#define AT(type, base, at) type(uint64_t(base) + 4 * uint64_t(at))
#if RATE2 % 2 == 0
#define LOAD(i, at)                                                                                                   \
  if (i < RATE2 / 2) {                                                                                                \
    u16vec2 word = unpackUint2x16(AT(U32, own, at).d[i]);                                                             \
    halves[min(1 + 2 * i, RATE2)] = word.y;                                                                           \
    halves[min(2 + 2 * i, RATE2)] = word.x;                                                                           \
  }
#else
#define LOAD(i, at) if (i < RATE2) halves[min(1 + i, RATE2)] = AT(U16, odd##i, at).d[0];
#endif

// next_state
#define STATE(j, to)                                                                                                  \
  {                                                                                                                   \
    const int end = ((j) + 1) * RATE2 / 2, i = end / 16, from = max((j) * RATE2 / 2, 16 * i);                         \
    if (end == 16 * i) {                                                                                              \
      to = raw_value(halves[i]);                                                                                      \
    } else {                                                                                                          \
      if (from == 16 * i) window = packUint2x16(u16vec2(halves[min(i + 1, RATE2)], halves[i]));                       \
      window = shift_left(window, end - from);                                                                        \
      to = raw_value(unpackUint2x16(window).y);                                                                       \
    }                                                                                                                 \
  }
#define PART(q, quad)                                                                                                 \
  {                                                                                                                   \
    float a, b, c, d, e, f, g, h;                                                                                     \
    STATE(8 * q, a) STATE(8 * q + 1, b) STATE(8 * q + 2, c) STATE(8 * q + 3, d)                                       \
    STATE(8 * q + 4, e) STATE(8 * q + 5, f) STATE(8 * q + 6, g) STATE(8 * q + 7, h)                                   \
    [[unroll]] for (int r = 0; r < ROWS; r++) {                                                                       \
      vec4 v = F4(uint64_t(p.x) + 4 * (r * 128 + quad * 64 + q * 4)).d[x];                                            \
      low[r] += a * v.x + b * v.y + c * v.z + d * v.w;                                                                \
      high[r] += e * v.x + f * v.y + g * v.z + h * v.w;                                                               \
    }                                                                                                                 \
  }
#define QUAD(quad, at)                                                                                                \
  {                                                                                                                   \
    uint16_t halves[RATE2 + 1];                                                                                       \
    uint window = 0;                                                                                                  \
    halves[0] = AT(U16, before, at).d[0];                                                                             \
    LOAD(0, at) LOAD(1, at) LOAD(2, at) LOAD(3, at) LOAD(4, at) LOAD(5, at) LOAD(6, at) LOAD(7, at)                              \
    PART(0, quad) PART(1, quad) PART(2, quad) PART(3, quad)                                                           \
  }

void main() {
  const uint count = 8 * RATE2;
  uint lane = gl_LocalInvocationID.x & 31, first = (lane & 7) * RATE2, x = (lane >> 3) * 4;
  uint64_t tile = uint64_t(p.words) + 4 * uint64_t((lane >> 3) * p.row_words);
  U16 before = U16(tile + 2 * uint64_t(((first + count - 1) % count) ^ 1));
#if RATE2 % 2 == 0
  U32 own = U32(tile + 4 * uint64_t(first / 2));
#else
#define ODD(i) U16 odd##i = U16(tile + 2 * uint64_t((first + i) ^ 1));
  ODD(0) ODD(1) ODD(2) ODD(3) ODD(4) ODD(5) ODD(6) ODD(7)
#endif
  float low[ROWS], high[ROWS];
  [[unroll]] for (int r = 0; r < ROWS; r++) low[r] = high[r] = 0.0;
  uint at = 0;
  [[dont_unroll]] for (uint block = 0; block < p.blocks; block++, at += p.block_words) {
    QUAD(0, at)
    QUAD(1, at + 4 * p.row_words)
  }
  [[unroll]] for (int r = 0; r < ROWS; r++) p.o.d[gl_GlobalInvocationID.x * ROWS + r] = low[r] + high[r];
}
