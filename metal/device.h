// What all kernels share: decoding a tile in a simdgroup, the 128-wide Hadamard transform in a simdgroup, rows in and out.
// A tile is decoded by the 32 lanes of a simdgroup at once: lane l owns trellis positions 8 l .. 8 l + 7, which are input rows
// 2 q, 2 q + 1, 2 q + 8, 2 q + 9 (q = l & 3) of columns c and c + 8 (c = l >> 2). A rotated input row is kept in that order:
// 4 values for each q, so that a lane reads one float4.
// A variant's prefix defines MM_T (the activations' type) and, for packed weights, MM_CASES(X): the (codebook, rate2) pairs
// that occur.
#include <metal_stdlib>
#include <metal_simdgroup>
#include <metal_simdgroup_matrix>
#include "shared/format.h"
#include "shared/kernels.h"
#include "shared/activation.h"
#include "shared/router.h"
using namespace metal;

#define INT(name, slot) constant long& name [[buffer(slot)]]
#define FLOAT(name, slot) constant float& name [[buffer(slot)]]

// ---- decoding ----

template <int CODEBOOK>
inline uint codebook_word(uint state) {
  switch (CODEBOOK) {
#define X(id, name, multiplier, addend, half_rates) case id: return state * multiplier + addend;
    MM_CODEBOOKS(X)
#undef X
  }
  return 0;
}

// The value of a 16-bit state, with the format's one rounding to half.
template <int CODEBOOK>
inline half codebook_value(uint state) {
  uint word = codebook_word<CODEBOOK>(state);
  if (CODEBOOK == MM_CODEBOOK_MUL1) {
    uint pairs = (word & 0x00FF00FFu) + ((word >> 8) & 0x00FF00FFu);
    ushort sum = ushort(pairs & 0xFFFFu) + ushort(pairs >> 16);
    return fma(as_type<half>(ushort(0x6400 + sum)), half(MM_MUL1_SCALE), half(MM_MUL1_BIAS));
  }
  half2 parts = as_type<half2>((word & MM_PAIR_AND) ^ MM_PAIR_XOR);
  return parts.x + parts.y;
}

// A tile's words, spread over the simdgroup: each is read from memory once, by one lane.
struct TileWords {
  uint low;   // word `lane`
  uint high;  // word `lane + 32`, above 4 bits
};

template <int RATE2>
inline TileWords load_tile(device const uint* tile, uint lane) {
  TileWords words;
  words.low = lane < uint(4 * RATE2) ? tile[lane] : 0u;
  words.high = 4 * RATE2 > 32 && lane + 32 < uint(4 * RATE2) ? tile[lane + 32] : 0u;
  return words;
}

template <int RATE2>
inline uint tile_word(TileWords words, uint index) {
  uint low = simd_shuffle(words.low, ushort(index & 31));
  if (4 * RATE2 <= 32) return low;
  uint high = simd_shuffle(words.high, ushort(index & 31));
  return index < 32 ? low : high;
}

// The 32 stream bits from `bit` on, counted around the tile's circular stream.
template <int RATE2>
inline uint tile_bits(TileWords words, uint bit) {
  constexpr uint count = 4 * RATE2;
  uint index = bit >> 5, next = index + 1 == count ? 0 : index + 1, shift = bit & 31;
  uint first = tile_word<RATE2>(words, index), second = tile_word<RATE2>(words, next);
  return shift == 0 ? first : (first << shift) | (second >> (32 - shift));
}

// Where the window of a lane's position j ends, relative to the lane's first stream bit.
template <int RATE2>
constexpr uint window_end(int j) {
  return uint((j + 1) * RATE2) >> 1;
}

// weights [8]: the lane's positions. Windows are the high halves of a register that only ever shifts left; a new register is
// filled when a window would run out of it.
template <int CODEBOOK, int RATE2>
inline void decode_lane(TileWords words, uint lane, thread half* weights) {
  constexpr uint bits = 128 * RATE2;
  uint start = 4 * lane * RATE2 + window_end<RATE2>(0) + bits - MM_WINDOW_BITS;
  uint base = 0, window = 0;
  for (int j = 0; j < 8; j++) {
    uint ahead = window_end<RATE2>(j) - window_end<RATE2>(0);
    if (j == 0 || ahead - base > 16) {
      base = ahead;
      uint bit = start + ahead;
      window = tile_bits<RATE2>(words, bit >= bits ? bit - bits : bit);
    }
    weights[j] = codebook_value<CODEBOOK>((window << (ahead - base)) >> 16);
  }
}

// ---- decoding four tiles at once, for the products with few rows ----
//
// Eight lanes own a tile, a lane 32 positions: two columns, and RATE2 whole halfwords of the stream. A window is then a halfword,
// or the high half of a register that holds two neighbouring ones and only shifts left, by steps of at most 4: right shifts and
// bit fields cost an Apple GPU 4 cycles, short left shifts ride on an add (tests/agx has the count).

// w << by. `zero` is 0, but only known at run time: it keeps the compiler from merging the steps into a bit field operation.
inline uint shift_left(uint w, uint by, uint zero) {
  for (; by > 4; by -= 4) w = (w << 4) + zero;
  return (w << by) + zero;
}

// halves [RATE2 + 1]: the halfwords that lane % 8 owns of the tile `at` words from `tile`, after the one before them. `tile` does
// not change in the callers' loops: a lane's addresses are then pointers that stay and one offset that moves, for all of them.
template <int RATE2>
inline void load_stream(device const uint* tile, uint at, uint lane, thread ushort* halves) {
  constexpr uint count = 8 * RATE2;  // of a tile; within a word, the stream's first halfword is the high one
  uint first = (lane & 7) * RATE2;
  device const ushort* stream = (device const ushort*)tile;
  // The halfword before is a neighbour's last, which lies in the same cache line; a load costs no arithmetic.
  halves[0] = (stream + (((first + count - 1) % count) ^ 1))[2 * ulong(at)];
  if (RATE2 % 2 == 0) {
    device const uint* own = tile + first / 2 + at;
    for (int i = 0; i < RATE2 / 2; i++) {
      ushort2 word = as_type<ushort2>(own[i]);
      halves[1 + 2 * i] = word.y;
      halves[2 + 2 * i] = word.x;
    }
  } else {
    for (int i = 0; i < RATE2; i++) halves[1 + i] = (stream + ((first + i) ^ 1))[2 * ulong(at)];
  }
}

// The state of the lane's position j, in order from 0 on: `window` goes from one to the next. All but the shifts is constant once
// the caller's loop is unrolled.
template <int RATE2>
inline ushort next_state(thread const ushort* halves, int j, uint zero, thread uint& window) {
  int end = window_end<RATE2>(j), i = end / 16, from = max(int(window_end<RATE2>(j - 1)), 16 * i);
  if (end == 16 * i) return halves[i];
  if (from == 16 * i) window = as_type<uint>(ushort2(halves[i + 1], halves[i]));
  window = shift_left(window, uint(end - from), zero);
  return as_type<ushort2>(window).y;
}

// A state's weight up to RAW_SCALE and RAW_BIAS, which are applied once a sum. mul1: the byte sum S, read as a subnormal half
// (S * 2^-24); the format's rounding of every weight to half is left out, at most 2^-10 each. Others: the weight itself.
template <int CODEBOOK>
inline float raw_value(uint state) {
  if (CODEBOOK != MM_CODEBOOK_MUL1) return float(codebook_value<CODEBOOK>(state));
  uint word = codebook_word<CODEBOOK>(state);
  ushort2 pairs = as_type<ushort2>((word & 0x00FF00FFu) + ((word >> 8) & 0x00FF00FFu));
  return float(as_type<half>(ushort(pairs.x + pairs.y)));
}
#define RAW_SCALE (MM_MUL1_SCALE * 16777216.0f)
#define RAW_BIAS (1024.0f * MM_MUL1_SCALE + MM_MUL1_BIAS)

// ---- Hadamard ----

// v = elements 4 lane .. 4 lane + 3 of a row of 128; returns the transform's, scaled by 1/sqrt(128).
inline float4 hadamard128(float4 v, uint lane) {
  v = float4(v.x + v.y, v.x - v.y, v.z + v.w, v.z - v.w);
  v = float4(v.x + v.z, v.y + v.w, v.x - v.z, v.y - v.w);
  for (ushort bit = 1; bit < 32; bit *= 2) {
    float4 other = float4(simd_shuffle_xor(v.x, bit), simd_shuffle_xor(v.y, bit), simd_shuffle_xor(v.z, bit),
                          simd_shuffle_xor(v.w, bit));
    v = (lane & bit) ? other - v : v + other;
  }
  return v * MM_HADAMARD_SCALE;
}

// Writes a rotated row of 128 in decoding order: element e = 16 t + r goes to float4 t * 4 + q.
inline void store_tiled(threadgroup float* tiled, float4 v, uint lane) {
  for (uint i = 0; i < 4; i++) {
    uint element = 4 * lane + i, row = element & 15;
    uint q = (row & 7) >> 1, place = (row & 1) + ((row >> 3) << 1);
    tiled[(element >> 4) * 16 + q * 4 + place] = v[i];
  }
}

inline void store_tiled_device(device float* tiled, float4 v, uint lane) {
  for (uint i = 0; i < 4; i++) {
    uint element = 4 * lane + i, row = element & 15;
    uint q = (row & 7) >> 1, place = (row & 1) + ((row >> 3) << 1);
    tiled[(element >> 4) * 16 + q * 4 + place] = v[i];
  }
}

// Elements 4 lane .. 4 lane + 3 of x[column ...] times suh; elements from `width` on are padding and count as 0.
inline float4 load_scaled(device const MM_T* x, device const half* suh, uint column, uint width, uint lane) {
  float4 v = 0.0f;
  for (uint i = 0; i < 4; i++) {
    uint element = column + 4 * lane + i;
    if (element < width) v[i] = float(x[element]) * float(suh[element]);
  }
  return v;
}

// svh and bias of elements 4 lane .. 4 lane + 3 of a block of outputs.
inline float4 scale_output(float4 v, device const half* svh, device const half* bias, bool has_bias, uint column,
                           uint lane) {
  for (uint i = 0; i < 4; i++) {
    uint element = column + 4 * lane + i;
    v[i] = v[i] * float(svh[element]) + (has_bias ? float(bias[element]) : 0.0f);
  }
  return v;
}
