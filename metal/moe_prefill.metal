// moe_trellis_swiglu for many tokens: pairs (token, expert) are sorted by expert on the device and cut into tiles of
// MM_PREFILL_ROWS rows of one expert, so that a packed tile is decoded once for as many rows. Four dispatches a chunk of tokens:
// sort, gate and up, down, combine. The host never sees the routing: grids are sized for the worst case, and a threadgroup
// without rows leaves at once. Variants as in moe_decode.metal, without MM_ROWS.
#include "expert.h"

// order [pairs]: pairs by expert; tiles [most_tiles, 3]: expert, first place, rows (0 past the last). One threadgroup.
// Pairs of one expert may come in any order: their results do not depend on it.
kernel void moe_sort(device const MM_ID* all_ids [[buffer(SORT_IDS)]], device int* order [[buffer(SORT_ORDER)]],
                     device int* tiles [[buffer(SORT_TILES)]], INT(pairs, SORT_PAIRS), INT(experts, SORT_EXPERTS),
                     INT(most_tiles, SORT_MOST_TILES), INT(first, SORT_FIRST),
                     uint thread_index [[thread_index_in_threadgroup]]) {
  threadgroup atomic_uint counts[MM_MAX_EXPERTS];
  threadgroup uint starts[MM_MAX_EXPERTS];
  threadgroup uint tile_starts[MM_MAX_EXPERTS];
  threadgroup uint used;
  device const MM_ID* ids = all_ids + first;
  for (uint e = thread_index; e < MM_MAX_EXPERTS; e += MM_SORT_THREADS)
    atomic_store_explicit(&counts[e], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint p = thread_index; p < uint(pairs); p += MM_SORT_THREADS)
    if (in_range(ids[p], uint(experts))) atomic_fetch_add_explicit(&counts[ids[p]], 1u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (thread_index == 0) {
    uint place = 0, tile = 0;
    for (uint e = 0; e < uint(experts); e++) {
      uint count = atomic_load_explicit(&counts[e], memory_order_relaxed);
      starts[e] = place;
      tile_starts[e] = tile;
      place += count;
      tile += (count + MM_PREFILL_ROWS - 1) / MM_PREFILL_ROWS;
    }
    used = tile;
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_index; e < uint(experts); e += MM_SORT_THREADS) {
    uint count = atomic_load_explicit(&counts[e], memory_order_relaxed);
    for (uint r = 0, t = tile_starts[e]; r < count; r += MM_PREFILL_ROWS, t++) {
      tiles[t * MM_TILE_ENTRY] = int(e);
      tiles[t * MM_TILE_ENTRY + 1] = int(starts[e] + r);
      tiles[t * MM_TILE_ENTRY + 2] = int(min(count - r, uint(MM_PREFILL_ROWS)));
    }
  }
  for (uint t = used + thread_index; t < uint(most_tiles); t += MM_SORT_THREADS) tiles[t * MM_TILE_ENTRY + 2] = 0;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint e = thread_index; e < uint(experts); e += MM_SORT_THREADS)
    atomic_store_explicit(&counts[e], 0u, memory_order_relaxed);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint p = thread_index; p < uint(pairs); p += MM_SORT_THREADS)
    if (in_range(ids[p], uint(experts)))
      order[starts[ids[p]] + atomic_fetch_add_explicit(&counts[ids[p]], 1u, memory_order_relaxed)] = int(p);
}

// shared_rows [MM_PREFILL_ROWS, 128] = tile rows times 128 columns of an expert's gate or up
inline void project(thread const Expert& expert, device const MM_T* x, device const int* places, uint rows, uint top_k,
                    uint hidden, uint column, threadgroup float* shared_rows, threadgroup float* tile, uint simd,
                    uint lane) {
  Sums sums;
  clear(sums);
  for (uint block = 0; block < MM_PAD(hidden) / 128; block++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = simd; r < MM_PREFILL_ROWS; r += 8) {
      float4 v = 0.0f;
      if (r < rows)
        v = hadamard128(load_scaled(x + ulong(uint(places[r]) / top_k) * hidden, expert.suh, block * 128, hidden, lane), lane);
      *(threadgroup float4*)(shared_rows + r * 128 + 4 * lane) = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_expert(expert, block, column / 16 + simd, shared_rows, tile, lane, sums);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_sums(shared_rows, sums, simd);
  threadgroup_barrier(mem_flags::mem_threadgroup);
}

// act [pairs, padded intermediate], a row for each place in `order`, in natural order. Gate first, then up, so that both fit
// the threadgroup's memory; gate's outputs wait in registers.
kernel void moe_gate_up_prefill(device const MM_T* all_x [[buffer(MOE_X)]], device float* act [[buffer(MOE_ACT)]],
                                STACK(gate, MOE_GATE), STACK(up, MOE_UP),
                                device const half* down_suh [[buffer(MOE_DOWN_SUH)]], INT(top_k, MOE_TOP_K),
                                INT(hidden, MOE_HIDDEN), INT(intermediate, MOE_INTERMEDIATE), FLOAT(alpha, MOE_ALPHA),
                                FLOAT(limit, MOE_LIMIT), INT(first, MOE_FIRST),
                                device const int* order [[buffer(MOE_ORDER)]], device const int* tiles [[buffer(MOE_TILES)]],
                                uint3 group [[threadgroup_position_in_grid]],
                                uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  alignas(16) threadgroup float shared_rows[MM_PREFILL_ROWS * 128];
  threadgroup float shared_tiles[8 * 256];
  device const int* entry = tiles + group.y * MM_TILE_ENTRY;
  uint h = uint(hidden), inner = uint(intermediate), k = MM_PAD(h), n = MM_PAD(inner), column = group.x * 128;
  uint rows = uint(entry[2]);
  if (!rows) return;
  uint e = uint(entry[0]), place = uint(entry[1]), top = uint(top_k);
  device const MM_T* x = all_x + ulong(first) * h;
  threadgroup float* tile = shared_tiles + simd * 256;
  Expert gate = FIND(gate, e, k, n), up = FIND(up, e, k, n);
  float4 g[MM_PREFILL_ROWS / 8];
  project(gate, x, order + place, rows, top, h, column, shared_rows, tile, simd, lane);
  for (uint i = 0; i < MM_PREFILL_ROWS / 8; i++) {
    float4 v = *(threadgroup const float4*)(shared_rows + (simd + 8 * i) * 128 + 4 * lane);
    g[i] = scale_output(hadamard128(v, lane), gate.svh, gate.bias, MM_HAS_GATE_BIAS, column, lane);
  }
  project(up, x, order + place, rows, top, h, column, shared_rows, tile, simd, lane);
  for (uint i = 0; i < MM_PREFILL_ROWS / 8 && simd + 8 * i < rows; i++) {
    float4 u = *(threadgroup const float4*)(shared_rows + (simd + 8 * i) * 128 + 4 * lane);
    u = scale_output(hadamard128(u, lane), up.svh, up.bias, MM_HAS_UP_BIAS, column, lane);
    float4 v = 0.0f;
    for (uint j = 0; j < 4; j++) {
      uint element = column + 4 * lane + j;
      if (element < inner)
        v[j] = activate(g[i][j], u[j], alpha, limit) *
               float(down_suh[ulong(e) * n + element]);
    }
    *(device float4*)(act + ulong(place + simd + 8 * i) * n + column + 4 * lane) = hadamard128(v, lane);
  }
}

// parts [pairs, hidden]: down's output of every pair, times its routing weight; rows are pairs, not places.
kernel void moe_down_prefill(device const float* act [[buffer(DOWN_ACT)]], device const MM_W* all_weights [[buffer(DOWN_WEIGHTS)]],
                             device float* parts [[buffer(DOWN_Y)]], STACK(down, DOWN_STACK), INT(top_k, DOWN_TOP_K),
                             INT(hidden, DOWN_HIDDEN), INT(intermediate, DOWN_INTERMEDIATE), INT(first, DOWN_FIRST),
                             device const int* order [[buffer(DOWN_ORDER)]], device const int* tiles [[buffer(DOWN_TILES)]],
                             uint3 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],
                             uint lane [[thread_index_in_simdgroup]]) {
  alignas(16) threadgroup float shared_rows[MM_PREFILL_ROWS * 128];
  threadgroup float shared_tiles[8 * 256];
  device const int* entry = tiles + group.y * MM_TILE_ENTRY;
  uint h = uint(hidden), k = MM_PAD(uint(intermediate)), n = MM_PAD(h), column = group.x * 128, rows = uint(entry[2]);
  if (!rows) return;
  uint e = uint(entry[0]), place = uint(entry[1]);
  device const MM_W* weights = all_weights + ulong(first) * uint(top_k);
  Expert down = FIND(down, e, k, n);
  Sums sums;
  clear(sums);
  for (uint block = 0; block < k / 128; block++) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = simd; r < MM_PREFILL_ROWS; r += 8) {
      float4 v = 0.0f;
      if (r < rows) v = *(device const float4*)(act + ulong(place + r) * k + block * 128 + 4 * lane);
      *(threadgroup float4*)(shared_rows + r * 128 + 4 * lane) = v;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    multiply_expert(down, block, group.x * 8 + simd, shared_rows, shared_tiles + simd * 256, lane, sums);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_sums(shared_rows, sums, simd);
  threadgroup_barrier(mem_flags::mem_threadgroup);
  for (uint r = simd; r < rows; r += 8) {
    uint pair = uint(order[place + r]);
    float4 v = *(threadgroup const float4*)(shared_rows + r * 128 + 4 * lane);
    v = float(weights[pair]) * scale_output(hadamard128(v, lane), down.svh, down.bias, MM_HAS_DOWN_BIAS, column, lane);
    for (uint i = 0; i < 4; i++)
      if (column + 4 * lane + i < h) parts[ulong(pair) * h + column + 4 * lane + i] = v[i];
  }
}

// y [tokens, hidden] = the sum of a token's parts, slot by slot. A slot of MM_NO_EXPERT adds nothing; any other id that is out of
// range makes it NaN: nothing to multiply by.
kernel void moe_combine(device const float* parts [[buffer(COMBINE_PARTS)]], device MM_T* all_y [[buffer(COMBINE_Y)]],
                        device const MM_ID* all_ids [[buffer(COMBINE_IDS)]], INT(top_k, COMBINE_TOP_K),
                        INT(hidden, COMBINE_HIDDEN), INT(experts, COMBINE_EXPERTS), INT(first, COMBINE_FIRST),
                        uint3 position [[thread_position_in_grid]]) {
  uint h = uint(hidden), top = uint(top_k), column = position.x, token = position.y;
  float sum = 0.0f;
  for (uint slot = 0; slot < top; slot++) {
    uint pair = token * top + slot;
    MM_ID id = all_ids[ulong(first) * top + pair];
    if (id != MM_NO_EXPERT) sum += in_range(id, uint(experts)) ? parts[ulong(pair) * h + column] : NAN;
  }
  all_y[(ulong(first) + token) * h + column] = MM_T(sum);
}
