// router: gate product, scores, top k and weights of one token in one threadgroup. The order is total, as on the CPU: higher
// score first, a NaN above all numbers, equal scores by index. Variants: MM_T, MM_G (gate's type), MM_C (correction's),
// MM_HAS_CORRECTION, MM_ROUTER (the kind), MM_RENORMALIZE.
#include "device.h"

// Whether (a, i) comes before (b, j).
inline bool before(float a, uint i, float b, uint j) {
  bool a_nan = isnan(a), b_nan = isnan(b);
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a != b) return a > b;
  return i < j;
}

// The index of the best value not yet taken; the same for all lanes of the simdgroup. Marks it taken.
inline uint take_best(threadgroup const float* values, threadgroup bool* taken, uint count, uint lane) {
  float best = 0.0f;
  uint index = count;
  for (uint i = lane; i < count; i += 32)
    if (!taken[i] && (index == count || before(values[i], i, best, index))) best = values[i], index = i;
  for (ushort bit = 1; bit < 32; bit *= 2) {
    float other = simd_shuffle_xor(best, bit);
    uint other_index = simd_shuffle_xor(index, bit);
    if (other_index != count && (index == count || before(other, other_index, best, index))) best = other, index = other_index;
  }
  if (lane == index % 32) taken[index] = true;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  return index;
}

inline void clear_taken(threadgroup bool* taken, uint count, uint lane) {
  for (uint i = lane; i < count; i += 32) taken[i] = false;
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// A group's score: its two best, or its one.
inline float group_score(threadgroup const float* values, uint first, uint size) {
  float a = values[first], b = 0.0f;
  bool pair = size > 1;
  if (pair) {
    b = values[first + 1];
    if (before(b, 1, a, 0)) {
      float c = a;
      a = b;
      b = c;
    }
  }
  for (uint i = 2; i < size; i++) {
    float v = values[first + i];
    if (before(v, i, a, 0)) {
      b = a;
      a = v;
    } else if (before(v, i, b, 0)) {
      b = v;
    }
  }
  return pair ? a + b : a;
}

kernel void route(device const MM_T* x [[buffer(ROUTER_X)]], device const MM_G* gate [[buffer(ROUTER_GATE)]],
                  device const MM_C* correction [[buffer(ROUTER_CORRECTION)]],
                  device float* weights [[buffer(ROUTER_WEIGHTS)]], device long* ids [[buffer(ROUTER_IDS)]],
                  device float* logits [[buffer(ROUTER_LOGITS)]], INT(hidden, ROUTER_HIDDEN), INT(experts, ROUTER_EXPERTS),
                  INT(top_k, ROUTER_TOP_K), FLOAT(scale, ROUTER_SCALE), INT(n_group, ROUTER_N_GROUP),
                  INT(topk_group, ROUTER_TOPK_GROUP), uint3 group [[threadgroup_position_in_grid]],
                  uint simd [[simdgroup_index_in_threadgroup]], uint lane [[thread_index_in_simdgroup]]) {
  threadgroup float scores[MM_MAX_EXPERTS];
  threadgroup float choice[MM_MAX_EXPERTS];
  threadgroup float group_scores[MM_MAX_EXPERTS];
  threadgroup bool taken[MM_MAX_EXPERTS];
  uint h = uint(hidden), count = uint(experts), token = group.x, top = uint(top_k);
  for (uint e = simd; e < count; e += MM_ROUTER_THREADS / 32) {
    float sum = 0.0f;
    for (uint i = lane; i < h; i += 32) sum += float(x[ulong(token) * h + i]) * float(gate[ulong(e) * h + i]);
    sum = simd_sum(sum);
    if (lane == 0) {
      scores[e] = sum;
      logits[ulong(token) * count + e] = sum;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  if (simd != 0) return;  // the choice is one simdgroup's work, and no barrier of the threadgroup follows

  if (MM_ROUTER == MM_ROUTER_SOFTMAX_TOPK) {
    float most = -INFINITY, sum = 0.0f;
    for (uint e = lane; e < count; e += 32) most = scores[e] > most ? scores[e] : most;
    most = simd_max(most);
    for (uint e = lane; e < count; e += 32) {
      scores[e] = exp(scores[e] - most);
      sum += scores[e];
    }
    sum = simd_sum(sum);
    for (uint e = lane; e < count; e += 32) scores[e] /= sum;
  } else if (MM_ROUTER == MM_ROUTER_SIGMOID_TOPK) {
    for (uint e = lane; e < count; e += 32) scores[e] = 1.0f / (1.0f + exp(-scores[e]));
  }
  for (uint e = lane; e < count; e += 32) choice[e] = scores[e] + (MM_HAS_CORRECTION ? float(correction[e]) : 0.0f);
  clear_taken(taken, count, lane);

  if (n_group > 1) {
    uint groups = uint(n_group), size = count / groups;
    for (uint g = lane; g < groups; g += 32) group_scores[g] = group_score(choice, g * size, size);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = 0; i < uint(topk_group); i++) take_best(group_scores, taken, groups, lane);
    for (uint e = lane; e < count; e += 32)
      if (!taken[e / size]) choice[e] = -INFINITY;
    simdgroup_barrier(mem_flags::mem_threadgroup);
    clear_taken(taken, count, lane);
  }

  float mine = 0.0f;  // the score of slot `lane`: MM_MAX_TOP_K is the simdgroup's width
  uint slot_expert = 0;
  for (uint slot = 0; slot < top; slot++) {
    uint e = take_best(choice, taken, count, lane);
    if (lane == slot) {
      slot_expert = e;
      mine = MM_ROUTER == MM_ROUTER_TOPK_SOFTMAX ? choice[e] : scores[e];
    }
  }
  if (MM_ROUTER == MM_ROUTER_TOPK_SOFTMAX) {
    float most = simd_max(lane < top ? mine : -INFINITY);
    mine = lane < top ? exp(mine - most) : 0.0f;
    mine /= simd_sum(mine);
  } else if (MM_RENORMALIZE) {
    mine /= simd_sum(lane < top ? mine : 0.0f) + 1e-20f;
  }
  if (lane < top) {
    weights[ulong(token) * top + lane] = mine * scale;
    ids[ulong(token) * top + lane] = long(slot_expert);
  }
}
