// moe_trellis_swiglu for up to MM_DECODE_ROWS tokens, in two dispatches. A threadgroup works for all pairs (token, expert) of
// one expert at once, so an expert's weights are read once a call, however many tokens chose it; the routing is never read back:
// the grid has a threadgroup row for every pair, and the ones that are not the first of their expert leave at once.
// Variants: MM_T, MM_W (routing weights), MM_ID, MM_ROWS, MM_ACTIVATION, MM_CASES, MM_HAS_{GATE,UP,DOWN}_BIAS.
#include "expert.h"

// The pairs of one expert, in order: `members` [ROWS] in threadgroup memory. Returns how many, 0 if `pair` does not begin a
// group of ROWS (then nobody is to work on it). All simdgroups count, the first one writes.
template <int ROWS>
inline uint gather(device const MM_ID* ids, uint pairs, uint pair, threadgroup uint* members, uint simd, uint lane) {
  MM_ID expert = ids[pair];
  uint before = 0, count = 0;
  for (uint first = 0; first < pairs; first += 32) {
    uint mine = first + lane;
    bool same = mine < pairs && ids[mine] == expert;
    uint earlier = simd_prefix_exclusive_sum(same ? 1u : 0u), total = simd_sum(same ? 1u : 0u);
    before += simd_sum(same && mine < pair ? 1u : 0u);
    uint place = count + earlier;
    // Pairs before `pair` are counted by then: ids are scanned in order, so `before` is final once mine >= pair.
    if (same && mine >= pair && place - before < uint(ROWS) && simd == 0) members[place - before] = mine;
    count += total;
  }
  return before % ROWS ? 0 : min(count - before, uint(ROWS));
}

// act [pairs, padded intermediate]: gate, up, activation, and down's input rotation. Simdgroup: column tile simd % 8, gate or
// up, and every second block of inputs.
kernel void moe_gate_up_decode(device const MM_T* x [[buffer(MOE_X)]], device const MM_ID* ids [[buffer(MOE_IDS)]],
                               device float* act [[buffer(MOE_ACT)]], STACK(gate, MOE_GATE), STACK(up, MOE_UP),
                               device const half* down_suh [[buffer(MOE_DOWN_SUH)]], INT(tokens, MOE_TOKENS),
                               INT(top_k, MOE_TOP_K), INT(hidden, MOE_HIDDEN), INT(intermediate, MOE_INTERMEDIATE),
                               FLOAT(alpha, MOE_ALPHA), FLOAT(limit, MOE_LIMIT), INT(experts, MOE_EXPERTS),
                               uint3 group [[threadgroup_position_in_grid]],
                               uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  constexpr uint splits = MM_DECODE_SPLITS / 2;
  alignas(16) threadgroup float shared_rows[MM_DECODE_SPLITS * MM_ROWS * 128];
  threadgroup float x_sums[MM_DECODE_SPLITS * MM_ROWS];
  threadgroup uint members[MM_ROWS];
  uint h = uint(hidden), inner = uint(intermediate), k = MM_PAD(h), n = MM_PAD(inner), column = group.x * 128;
  uint top = uint(top_k);
  if (!in_range(ids[group.y], uint(experts))) return;
  uint count = gather<MM_ROWS>(ids, uint(tokens) * top, group.y, members, simd, lane);
  if (!count) return;
  uint e = uint(ids[group.y]);
  Expert gate = FIND(gate, e, k, n), up = FIND(up, e, k, n);
  uint tile = simd & 7, part = simd >> 3, split = part >> 1;
  bool is_up = part & 1;
  Expert mine = gate;
  if (is_up) mine = up;
  threadgroup float* rows = shared_rows + part * MM_ROWS * 128;
  float sums[2 * MM_ROWS] = {0};
  float x_sum = 0.0f;  // of the row that this simdgroup rotates, over its blocks
  uint zero = uint(ulong(tokens) >> 63);
  device const uint* tiles = tile_at(mine, 0, group.x * 8 + tile);
  uint at = split * 8 * row_words(mine);
  for (uint first = 0; first < k / 128; first += splits, at += splits * 8 * row_words(mine)) {
    uint block = first + split;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (block < k / 128 && tile < MM_ROWS) {
      float4 v = 0.0f;
      if (tile < count) v = hadamard128(load_scaled(x + members[tile] / top * h, mine.suh, block * 128, h, lane), lane);
      store_tiled(rows + tile * 128, v, lane);
      x_sum += simd_sum(sum4(v));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (block < k / 128) multiply_expert<MM_ROWS>(mine, tiles, at, rows, lane, zero, sums);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  store_sums<MM_ROWS>(rows, sums, tile, lane);
  if (tile < MM_ROWS && lane == 0) x_sums[part * MM_ROWS + tile] = x_sum;
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd < count) {
    float4 g = 0.0f, u = 0.0f;
    float g_sum = 0.0f, u_sum = 0.0f;
    for (uint s = 0; s < splits; s++) {
      g += *(threadgroup const float4*)(shared_rows + (2 * s * MM_ROWS + simd) * 128 + 4 * lane);
      u += *(threadgroup const float4*)(shared_rows + ((2 * s + 1) * MM_ROWS + simd) * 128 + 4 * lane);
      g_sum += x_sums[2 * s * MM_ROWS + simd];
      u_sum += x_sums[(2 * s + 1) * MM_ROWS + simd];
    }
    g = finish_sums(g, g_sum, gate.codebook);
    u = finish_sums(u, u_sum, up.codebook);
    g = scale_output(hadamard128(g, lane), gate.svh, gate.bias, MM_HAS_GATE_BIAS, column, lane);
    u = scale_output(hadamard128(u, lane), up.svh, up.bias, MM_HAS_UP_BIAS, column, lane);
    store_activation(act + ulong(members[simd]) * n + column, g, u, down_suh + ulong(e) * n, column, inner,
                     alpha, limit, lane);
  }
}

// y [tokens, hidden]: down, weighted and summed over each token's experts, in the order of the pairs that begin a group.
// A threadgroup owns 128 columns of all tokens. Simdgroup: column tile simd % 8, and every MM_DECODE_SPLITS-th block of inputs.
kernel void moe_down_decode(device const float* act [[buffer(DOWN_ACT)]], device const MM_ID* ids [[buffer(DOWN_IDS)]],
                            device const MM_W* weights [[buffer(DOWN_WEIGHTS)]], device MM_T* y [[buffer(DOWN_Y)]],
                            STACK(down, DOWN_STACK), INT(tokens, DOWN_TOKENS), INT(top_k, DOWN_TOP_K),
                            INT(hidden, DOWN_HIDDEN), INT(intermediate, DOWN_INTERMEDIATE), INT(experts, DOWN_EXPERTS),
                            uint3 group [[threadgroup_position_in_grid]], uint simd [[simdgroup_index_in_threadgroup]],
                            uint lane [[thread_index_in_simdgroup]]) {
  alignas(16) threadgroup float shared_rows[MM_DECODE_SPLITS * MM_ROWS * 128];
  threadgroup float x_sums[MM_DECODE_SPLITS * MM_ROWS];
  threadgroup uint members[MM_ROWS];
  uint h = uint(hidden), k = MM_PAD(uint(intermediate)), n = MM_PAD(h), column = group.x * 128, top = uint(top_k);
  uint pairs = uint(tokens) * top, tile = simd & 7, split = simd >> 3;
  threadgroup float* rows = shared_rows + split * MM_ROWS * 128;
  float4 total = 0.0f;  // of token `simd`
  uint zero = uint(ulong(tokens) >> 63);
  for (uint pair = 0; pair < pairs; pair++) {
    if (!in_range(ids[pair], uint(experts))) {  // nothing to multiply by: unless on purpose, the token's result is no number
      if (ids[pair] != MM_NO_EXPERT && pair / top == simd) total = NAN;
      continue;
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint count = gather<MM_ROWS>(ids, pairs, pair, members, simd, lane);
    if (!count) continue;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    Expert down = FIND(down, uint(ids[pair]), k, n);
    float sums[2 * MM_ROWS] = {0};
    float x_sum = 0.0f;
    device const uint* tiles = tile_at(down, 0, group.x * 8 + tile);
    uint at = split * 8 * row_words(down);
    for (uint first = 0; first < k / 128; first += MM_DECODE_SPLITS, at += MM_DECODE_SPLITS * 8 * row_words(down)) {
      uint block = first + split;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (block < k / 128 && tile < MM_ROWS) {
        float4 v = 0.0f;
        if (tile < count) v = *(device const float4*)(act + ulong(members[tile]) * k + block * 128 + 4 * lane);
        *(threadgroup float4*)(rows + tile * 128 + 4 * lane) = v;
        x_sum += simd_sum(sum4(v));
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      if (block < k / 128) multiply_expert<MM_ROWS>(down, tiles, at, rows, lane, zero, sums);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    store_sums<MM_ROWS>(rows, sums, tile, lane);
    if (tile < MM_ROWS && lane == 0) x_sums[split * MM_ROWS + tile] = x_sum;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint r = 0; r < count; r++) {
      if (members[r] / top != simd) continue;
      float4 v = 0.0f;
      x_sum = 0.0f;
      for (uint s = 0; s < MM_DECODE_SPLITS; s++) {
        v += *(threadgroup const float4*)(shared_rows + (s * MM_ROWS + r) * 128 + 4 * lane);
        x_sum += x_sums[s * MM_ROWS + r];
      }
      v = finish_sums(v, x_sum, down.codebook);
      v = scale_output(hadamard128(v, lane), down.svh, down.bias, MM_HAS_DOWN_BIAS, column, lane);
      total += float(weights[members[r]]) * v;
    }
  }
  if (simd < uint(tokens))
    for (uint i = 0; i < 4; i++)
      if (column + 4 * lane + i < h) y[simd * h + column + 4 * lane + i] = MM_T(total[i]);
}
