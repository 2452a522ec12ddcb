// The product of rotated rows with 128 columns of a packed weight, in two forms that both decode each tile once.
//   decode   up to MM_DECODE_ROWS rows: a lane multiplies its 8 weights as it decodes them, sums stay in registers
//   prefill  MM_PREFILL_ROWS rows: a simdgroup decodes a tile into threadgroup memory and multiplies it as 8 x 8 matrices
// Both work on one block of 128 inputs at a time, rotated by the caller into threadgroup memory.
#include "device.h"

// ---- decode ----

// sums [2 ROWS] += x [ROWS, 128] (in decoding order) times the 128 inputs x 16 columns whose first tile is `tiles`;
// the lane's columns are c and c + 8, and its rows of a tile the four of q.
template <int CODEBOOK, int RATE2, int ROWS>
inline void multiply_rows(device const uint* tiles, uint row_words, threadgroup const float* x, uint lane,
                          thread float* sums) {
  uint q = lane & 3;
  for (uint t = 0; t < 8; t++) {
    half weights[8];
    decode_lane<CODEBOOK, RATE2>(load_tile<RATE2>(tiles + t * row_words, lane), lane, weights);
    for (int r = 0; r < ROWS; r++) {
      float4 v = *(threadgroup const float4*)(x + r * 128 + t * 16 + q * 4);
      sums[2 * r] += float(weights[0]) * v.x + float(weights[1]) * v.y + float(weights[2]) * v.z + float(weights[3]) * v.w;
      sums[2 * r + 1] += float(weights[4]) * v.x + float(weights[5]) * v.y + float(weights[6]) * v.z + float(weights[7]) * v.w;
    }
  }
}

// Adds the four lanes of each column and writes the 16 columns of column tile `tile`: out [ROWS, 128].
template <int ROWS>
inline void store_sums(threadgroup float* out, thread const float* sums, uint tile, uint lane) {
  for (int r = 0; r < ROWS; r++)
    for (uint side = 0; side < 2; side++) {
      float sum = sums[2 * r + side];
      sum += simd_shuffle_xor(sum, ushort(1));
      sum += simd_shuffle_xor(sum, ushort(2));
      if ((lane & 3) == 0) out[r * 128 + tile * 16 + side * 8 + (lane >> 2)] = sum;
    }
}

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
