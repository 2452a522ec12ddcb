// dequantize: the dense weight, float32 [in_features, out_features]. `dequantize_rotated` writes the codebook's own values;
// the original domain takes two dispatches: `dequantize_columns` decodes and transforms along the outputs into padded scratch
// [k, n], `dequantize_rows` transforms along the inputs and crops. Variants: MM_CASES (one), MM_T (unused).
#include "device.h"

// 16 rows x 128 columns: simdgroup `simd` decodes one tile.
inline void decode_strip(device const uint* trellis, uint n, uint3 group, threadgroup float* strip, uint simd, uint lane) {
  half weights[8];
#define X(codebook, rate2)                                                                                       \
  decode_lane<codebook, rate2>(                                                                                  \
      load_tile<rate2>(trellis + (ulong(group.y) * (n / 16) + group.x * 8 + simd) * (4 * rate2), lane), lane, weights);
  MM_CASES(X)
#undef X
  for (uint i = 0; i < 8; i++) {
    uint row = 2 * (lane & 3) + (i & 1) + 8 * ((i >> 1) & 1), column = (lane >> 2) + 8 * (i >> 2);
    strip[row * 128 + simd * 16 + column] = float(weights[i]);
  }
}

kernel void dequantize_rotated(device const uint* trellis [[buffer(DEQUANTIZE_TRELLIS)]],
                               device float* out [[buffer(DEQUANTIZE_OUT)]], INT(in_features, DEQUANTIZE_IN),
                               INT(columns, DEQUANTIZE_COLUMNS), INT(n, DEQUANTIZE_N),
                               uint3 group [[threadgroup_position_in_grid]],
                               uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]],
                               uint thread_index [[thread_index_in_threadgroup]]) {
  alignas(16) threadgroup float strip[16 * 128];
  decode_strip(trellis, uint(n), group, strip, simd, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < 16 * 128; i += MM_DEQUANTIZE_THREADS) {
    uint row = group.y * 16 + i / 128, column = group.x * 128 + i % 128;
    if (row < uint(in_features) && column < uint(columns)) out[ulong(row) * uint(columns) + column] = strip[i];
  }
}

kernel void dequantize_columns(device const uint* trellis [[buffer(DEQUANTIZE_TRELLIS)]],
                               device const half* svh [[buffer(DEQUANTIZE_SVH)]],
                               device float* scratch [[buffer(DEQUANTIZE_SCRATCH)]], INT(n, DEQUANTIZE_N),
                               uint3 group [[threadgroup_position_in_grid]],
                               uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  alignas(16) threadgroup float strip[16 * 128];
  decode_strip(trellis, uint(n), group, strip, simd, lane);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint row = simd; row < 16; row += MM_DEQUANTIZE_THREADS / 32) {
    float4 v = hadamard128(*(threadgroup const float4*)(strip + row * 128 + 4 * lane), lane);
    for (uint i = 0; i < 4; i++) {
      uint column = group.x * 128 + 4 * lane + i;
      scratch[ulong(group.y * 16 + row) * uint(n) + column] = v[i] * float(svh[column]);
    }
  }
}

// 128 rows x 16 columns, transposed through threadgroup memory so that a simdgroup transforms one column.
kernel void dequantize_rows(device const float* scratch [[buffer(DEQUANTIZE_SCRATCH)]],
                            device const half* suh [[buffer(DEQUANTIZE_SUH)]], device float* out [[buffer(DEQUANTIZE_OUT)]],
                            INT(in_features, DEQUANTIZE_IN), INT(columns, DEQUANTIZE_COLUMNS), INT(n, DEQUANTIZE_N),
                            uint3 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]], uint thread_index [[thread_index_in_threadgroup]]) {
  alignas(16) threadgroup float strip[16 * 128];
  for (uint i = thread_index; i < 16 * 128; i += MM_DEQUANTIZE_THREADS)
    strip[(i % 16) * 128 + i / 16] = scratch[ulong(group.y * 128 + i / 16) * uint(n) + group.x * 16 + i % 16];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint column = simd; column < 16; column += MM_DEQUANTIZE_THREADS / 32) {
    threadgroup float4* mine = (threadgroup float4*)(strip + column * 128 + 4 * lane);
    *mine = hadamard128(*mine, lane);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint i = thread_index; i < 16 * 128; i += MM_DEQUANTIZE_THREADS) {
    uint row = group.y * 128 + i / 16, column = group.x * 16 + i % 16;
    if (row < uint(in_features) && column < uint(columns))
      out[ulong(row) * uint(columns) + column] = strip[(i % 16) * 128 + i / 16] * float(suh[row]);
  }
}
