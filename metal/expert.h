// What the mixture's kernels share: an expert's packed weights out of a stack, its activation, and the switch over the
// formats that occur. Variants: MM_ID (int or long), MM_ACTIVATION, MM_CASES, MM_HAS_*_BIAS.
#include "product.h"

#define STACK(name, slot)                                                                                       \
  device const uint* name##_trellis [[buffer(slot + STACK_TRELLIS)]],                                           \
  device const long* name##_table [[buffer(slot + STACK_TABLE)]],                                               \
  device const half* name##_suh [[buffer(slot + STACK_SUH)]], device const half* name##_svh [[buffer(slot + STACK_SVH)]], \
  device const half* name##_bias [[buffer(slot + STACK_BIAS)]]

// One expert's matrix of k inputs and n outputs.
struct Expert {
  device const uint* tiles;
  device const half* suh;
  device const half* svh;
  device const half* bias;
  uint n, rate2, codebook;
};

inline Expert find_expert(device const uint* trellis, device const long* table, device const half* suh,
                          device const half* svh, device const half* bias, uint expert, uint k, uint n) {
  Expert found;
  found.rate2 = uint(table[3 * expert + 1]);
  found.codebook = uint(table[3 * expert + 2]);
  found.tiles = trellis + table[3 * expert] / 2;  // the table counts int16
  found.suh = suh + ulong(expert) * k;
  found.svh = svh + ulong(expert) * n;
  found.bias = bias + ulong(expert) * n;
  found.n = n;
  return found;
}
#define FIND(name, expert, k, n) \
  find_expert(name##_trellis, name##_table, name##_suh, name##_svh, name##_bias, expert, k, n)

// The first word of the tile at (16 inputs) x (16 outputs), and the words from one tile row to the next.
inline device const uint* tile_at(thread const Expert& expert, uint tile_row, uint tile_column) {
  return expert.tiles + (ulong(tile_row) * (expert.n / 16) + tile_column) * (4 * expert.rate2);
}
inline uint row_words(thread const Expert& expert) { return expert.n / 16 * (4 * expert.rate2); }

template <int ROWS>
inline void multiply_expert(thread const Expert& expert, device const uint* tiles, uint at, threadgroup const float* x,
                            uint lane, uint zero, thread float* sums) {
  switch (expert.codebook * 32 + expert.rate2) {
#define X(codebook, rate2)                                                                     \
  case (codebook) * 32 + (rate2):                                                              \
    multiply_rows<codebook, rate2, ROWS>(tiles, at, row_words(expert), x, lane, zero, sums);   \
    break;
    MM_CASES(X)
#undef X
  }
}

inline void multiply_expert(thread const Expert& expert, uint block, uint tile_column, threadgroup const float* x,
                            threadgroup float* tile, uint lane, thread Sums& sums) {
  device const uint* tiles = tile_at(expert, block * 8, tile_column);
  switch (expert.codebook * 32 + expert.rate2) {
#define X(codebook, rate2)                                                                     \
  case (codebook) * 32 + (rate2):                                                              \
    multiply_tile_rows<codebook, rate2>(tiles, row_words(expert), x, tile, lane, sums);        \
    break;
    MM_CASES(X)
#undef X
  }
}

// Metal has no erf. A Chebyshev fit of erfc with a relative error under 1.2e-7 everywhere (Numerical Recipes, second edition,
// section 6.2).
inline float erf_float(float x) {
  float z = abs(x), t = 1.0f / (1.0f + 0.5f * z);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  float tail = t * exp(-z * z + p);
  return x >= 0.0f ? 1.0f - tail : tail - 1.0f;
}

// The activations of shared/activation.h; a NaN passes through every one.
inline float activate(float g, float u, float alpha, float limit) {
  switch (MM_ACTIVATION) {
    case MM_ACTIVATION_SILU:
      return g / (1.0f + exp(-g)) * u;
    case MM_ACTIVATION_GELU:
      return 0.5f * g * (1.0f + erf_float(g * 0.70710678f)) * u;
    case MM_ACTIVATION_GELU_TANH:
      return g / (1.0f + exp(-1.5957691216f * (g + 0.044715f * g * g * g))) * u;
    case MM_ACTIVATION_SWIGLU_OAI:
      g = g > limit ? limit : g;
      u = u > limit ? limit : (u < -limit ? -limit : u);
      return g / (1.0f + exp(-alpha * g)) * (u + 1.0f);
  }
  return 0.0f;
}

// Rotated input of `down`: elements 4 lane .. of a block of activations, in decoding order.
inline void store_activation(device float* act, float4 gate, float4 up, device const half* suh, uint column,
                             uint intermediate, float alpha, float limit, uint lane) {
  float4 v = 0.0f;
  for (uint i = 0; i < 4; i++) {
    uint element = column + 4 * lane + i;
    if (element < intermediate) v[i] = activate(gate[i], up[i], alpha, limit) * float(suh[element]);
  }
  store_tiled_device(act, hadamard128(v, lane), lane);
}

inline bool in_range(long id, uint experts) { return id >= 0 && id < long(experts); }
