// The product of rotated rows with 128 columns of a packed weight, in two forms that both decode each tile once.
//   decode   up to MM_DECODE_ROWS rows: a lane multiplies weights as it decodes them, sums stay in registers
//   prefill  MM_PREFILL_ROWS rows: a simdgroup decodes a tile into threadgroup memory and multiplies it as 8 x 8 matrices
// Both work on one block of 128 inputs at a time, rotated by the caller into threadgroup memory.
#include "device.h"

// ---- decode ----

// sums [2 ROWS] += x [ROWS, 128] (in decoding order) times the 128 inputs x 16 columns whose first tile is `at` words from
// `tiles`. Each quarter of the simdgroup takes every fourth tile; a lane's columns are c = lane % 8 and c + 8, its rows all 16.
template <int CODEBOOK, int RATE2, int ROWS>
inline void multiply_rows(device const uint* tiles, uint at, uint row_words, threadgroup const float* x, uint lane, uint zero,
                          thread float* sums) {
  tiles += (lane >> 3) * row_words;
  x += (lane >> 3) * 16;
  // Unrolled, indices of `halves` are constants, and so are the inputs' offsets.
#pragma unroll
  for (uint t = 0; t < 8; t += 4, at += 4 * row_words) {
    ushort halves[RATE2 + 1];
    uint window = 0;
    load_stream<RATE2>(tiles, at, lane, halves);
#pragma unroll
    for (int q = 0; q < 4; q++) {  // 4 rows of column c, of c + 8: both columns use an input while it is in registers
      float weights[8];
      for (int j = 0; j < 8; j++) weights[j] = raw_value<CODEBOOK>(next_state<RATE2>(halves, 8 * q + j, zero, window));
      for (int r = 0; r < ROWS; r++) {
        float4 v = *(threadgroup const float4*)(x + r * 128 + t * 16 + q * 4);
        for (int side = 0; side < 2; side++) {
          thread const float* w = weights + 4 * side;
          sums[2 * r + side] += w[0] * v.x + w[1] * v.y + w[2] * v.z + w[3] * v.w;
        }
      }
    }
  }
}

// Adds the four lanes of each column and writes the 16 columns of column tile `tile`: out [ROWS, 128].
template <int ROWS>
inline void store_sums(threadgroup float* out, thread const float* sums, uint tile, uint lane) {
  for (int r = 0; r < ROWS; r++)
    for (uint side = 0; side < 2; side++) {
      float sum = sums[2 * r + side];
      sum += simd_shuffle_xor(sum, ushort(8));
      sum += simd_shuffle_xor(sum, ushort(16));
      if (lane < 8) out[r * 128 + tile * 16 + side * 8 + lane] = sum;
    }
}

// What raw_value left out, for the sums v of one row: x_sum is the sum of all its rotated inputs.
inline float4 finish_sums(float4 v, float x_sum, uint codebook) {
  return codebook == MM_CODEBOOK_MUL1 ? v * RAW_SCALE + RAW_BIAS * x_sum : v;
}

inline float sum4(float4 v) { return (v.x + v.y) + (v.z + v.w); }

// ---- prefill ----

struct Sums {
  simdgroup_matrix<float, 8, 8> part[MM_PREFILL_ROWS / 8][2];
};

inline void clear(thread Sums& sums) {
  for (int m = 0; m < MM_PREFILL_ROWS / 8; m++)
    for (int side = 0; side < 2; side++) sums.part[m][side] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
}

// sums += x [MM_PREFILL_ROWS, 128] (in natural order) times 128 inputs x 16 columns; `tile` [16, 16] is this simdgroup's own.
template <int CODEBOOK, int RATE2>
inline void multiply_tile_rows(device const uint* tiles, uint row_words, threadgroup const float* x,
                               threadgroup float* tile, uint lane, thread Sums& sums) {
  uint q = lane & 3, c = lane >> 2;
  for (uint t = 0; t < 8; t++) {
    half weights[8];
    decode_lane<CODEBOOK, RATE2>(load_tile<RATE2>(tiles + t * row_words, lane), lane, weights);
    simdgroup_barrier(mem_flags::mem_threadgroup);  // the last tile has been read
    for (uint i = 0; i < 8; i++) {
      uint row = 2 * q + (i & 1) + 8 * ((i >> 1) & 1), column = c + 8 * (i >> 2);
      tile[row * 16 + column] = float(weights[i]);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint depth = 0; depth < 2; depth++)
      for (uint side = 0; side < 2; side++) {
        simdgroup_matrix<float, 8, 8> b;
        simdgroup_load(b, tile + depth * 8 * 16 + side * 8, 16);
        for (uint m = 0; m < MM_PREFILL_ROWS / 8; m++) {
          simdgroup_matrix<float, 8, 8> a;
          simdgroup_load(a, x + m * 8 * 128 + t * 16 + depth * 8, 128);
          simdgroup_multiply_accumulate(sums.part[m][side], a, b, sums.part[m][side]);
        }
      }
  }
}

// out [MM_PREFILL_ROWS, 128]: the 16 columns of column tile `tile`
inline void store_sums(threadgroup float* out, thread const Sums& sums, uint tile) {
  for (uint m = 0; m < MM_PREFILL_ROWS / 8; m++)
    for (uint side = 0; side < 2; side++)
      simdgroup_store(sums.part[m][side], out + m * 8 * 128 + tile * 16 + side * 8, 128);
}
