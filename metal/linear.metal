// trellis_linear: y = H(H(x * suh) W) * svh + bias for one packed weight. One threadgroup owns 128 output columns, which is
// one block of the output transform, and `decode` or `prefill` rows. Variants: MM_T, MM_ROWS, MM_HAS_BIAS, MM_CASES (one).
#include "product.h"

#define LINEAR_ARGUMENTS                                                                                       \
  device const MM_T* x [[buffer(LINEAR_X)]], device const uint* trellis [[buffer(LINEAR_TRELLIS)]],            \
  device const half* suh [[buffer(LINEAR_SUH)]], device const half* svh [[buffer(LINEAR_SVH)]],                \
  device const half* bias [[buffer(LINEAR_BIAS)]], device MM_T* y [[buffer(LINEAR_Y)]],                        \
  INT(rows, LINEAR_ROWS), INT(in_features, LINEAR_IN), INT(out_features, LINEAR_OUT),                          \
  uint3 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],                  \
  uint lane [[thread_index_in_simdgroup]]

inline void write_row(device MM_T* y, float4 v, uint column, uint width, uint lane) {
  for (uint i = 0; i < 4; i++)
    if (column + 4 * lane + i < width) y[column + 4 * lane + i] = MM_T(v[i]);
}

// Up to MM_ROWS rows. Simdgroup: column tile simd % 8, and every MM_DECODE_SPLITS-th block of inputs.
kernel void linear_decode(LINEAR_ARGUMENTS) {
  alignas(16) threadgroup float shared_rows[MM_DECODE_SPLITS * MM_ROWS * 128];
  threadgroup float x_sums[MM_DECODE_SPLITS * MM_ROWS];
  uint in = uint(in_features), out = uint(out_features), blocks = MM_PAD(in) / 128, n = MM_PAD(out);
  uint tile = simd & 7, split = simd >> 3, column = group.x * 128;
  threadgroup float* mine = shared_rows + split * MM_ROWS * 128;
  float sums[2 * MM_ROWS] = {0};
  float x_sum = 0.0f;  // of the row that this simdgroup rotates, over its blocks
  uint zero = uint(ulong(rows) >> 63);
  uint tile_words = 0;
#define X(codebook, rate2) tile_words = 4 * rate2;
  MM_CASES(X)
#undef X
  device const uint* tiles = trellis + (group.x * 8 + tile) * tile_words;
  uint row_words = n / 16 * tile_words, at = split * 8 * row_words;
  for (uint first = 0; first < blocks; first += MM_DECODE_SPLITS, at += MM_DECODE_SPLITS * 8 * row_words) {
    uint block = first + split;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (block < blocks && tile < MM_ROWS) {
      float4 v = 0.0f;
      if (tile < uint(rows)) v = hadamard128(load_scaled(x + tile * in, suh, block * 128, in, lane), lane);
      store_tiled(mine + tile * 128, v, lane);
      x_sum += simd_sum(sum4(v));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (block < blocks) {
#define X(codebook, rate2) multiply_rows<codebook, rate2, MM_ROWS>(tiles, at, row_words, mine, lane, zero, sums);
      MM_CASES(X)
#undef X
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_sums<MM_ROWS>(mine, sums, tile, lane);
  if (tile < MM_ROWS && lane == 0) x_sums[split * MM_ROWS + tile] = x_sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd < MM_ROWS && simd < uint(rows)) {
    float4 v = 0.0f;
    x_sum = 0.0f;
    for (uint s = 0; s < MM_DECODE_SPLITS; s++) {
      v += *(threadgroup const float4*)(shared_rows + (s * MM_ROWS + simd) * 128 + 4 * lane);
      x_sum += x_sums[s * MM_ROWS + simd];
    }
#define X(codebook, rate2) v = finish_sums(v, x_sum, codebook);
    MM_CASES(X)
#undef X
    v = scale_output(hadamard128(v, lane), svh, bias, MM_HAS_BIAS, column, lane);
    write_row(y + simd * out, v, column, out, lane);
  }
}

// MM_PREFILL_ROWS rows from group.y on. Simdgroup: column tile `simd`.
kernel void linear_prefill(LINEAR_ARGUMENTS) {
  alignas(16) threadgroup float shared_rows[MM_PREFILL_ROWS * 128];
  threadgroup float shared_tiles[8 * 256];
  uint in = uint(in_features), out = uint(out_features), blocks = MM_PAD(in) / 128, n = MM_PAD(out);
  uint row = group.y * MM_PREFILL_ROWS, column = group.x * 128;
  Sums sums;
  clear(sums);
  for (uint block = 0; block < blocks; block++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = simd; r < MM_PREFILL_ROWS; r += 8) {
      float4 v = 0.0f;
      if (row + r < uint(rows)) v = hadamard128(load_scaled(x + ulong(row + r) * in, suh, block * 128, in, lane), lane);
      *(threadgroup float4*)(shared_rows + r * 128 + 4 * lane) = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
#define X(codebook, rate2)                                                                                           \
  multiply_tile_rows<codebook, rate2>(trellis + (ulong(block) * 8 * (n / 16) + group.x * 8 + simd) * (4 * rate2),    \
                                      n / 16 * (4 * rate2), shared_rows, shared_tiles + simd * 256, lane, sums);
    MM_CASES(X)
#undef X
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_sums(shared_rows, sums, simd);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint r = simd; r < MM_PREFILL_ROWS && row + r < uint(rows); r += 8) {
    float4 v = *(threadgroup const float4*)(shared_rows + r * 128 + 4 * lane);
    v = scale_output(hadamard128(v, lane), svh, bias, MM_HAS_BIAS, column, lane);
    write_row(y + ulong(row + r) * out, v, column, out, lane);
  }
}
