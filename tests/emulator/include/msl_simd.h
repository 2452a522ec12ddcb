// Barriers and <metal_simdgroup>. Each lane hands in a payload; the last lane to arrive computes every lane's result.
// The types are those that Metal has these functions for: 64-bit integers, bool and (here) bfloat have to be converted.
#pragma once
namespace metal {
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
EMU_FN constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
EMU_FN constexpr mem_flags operator&(mem_flags a, mem_flags b) { return mem_flags(uint(a) & uint(b)); }
enum memory_order { memory_order_relaxed = 0, memory_order_acquire = 2, memory_order_release = 3, memory_order_acq_rel = 4, memory_order_seq_cst = 5 };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };

// Where a call stands. Default arguments are evaluated at the caller's line.
#define EMU_SITE const char *emu_file = __builtin_FILE(), int emu_line = __builtin_LINE()
EMU_FN void threadgroup_barrier(mem_flags flags, EMU_SITE) { emu_threadgroup_barrier((uint)flags, emu_file, emu_line); }
EMU_FN void simdgroup_barrier(mem_flags flags, EMU_SITE) { emu_simdgroup_barrier((uint)flags, emu_file, emu_line); }
EMU_FN void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device) {}

template <class T> struct emu_element { using type = T; };
template <class T, int N> struct emu_element<vec<T, N>> { using type = T; };
template <class T> EMU_FN constexpr void emu_simd_type() {
  using E = typename emu_element<T>::type;
  static_assert(!is_same_v<E, bool> && !is_same_v<E, bfloat> && sizeof(E) <= 4,
                "Metal has simdgroup functions for 8, 16 and 32 bit integers, half and float: convert bool and bfloat, split 64 bits");
}

template <class T> struct emu_payload { T value, result; uint operand; };
#define EMU_LANES(i) for (int i = 0; i < 32; i++) if (mask >> i & 1)
#define EMU_ALL_LANES(T, name, ...)                                                          \
  emu_payload<T> payload{value, value, operand};                                             \
  emu_simd([](void** payloads, uint mask) __attribute__((nodebug)) {                         \
      emu_payload<T>** p = (emu_payload<T>**)payloads; (void)p; (void)mask; __VA_ARGS__      \
    }, &payload, name, emu_file, emu_line);                                                  \
  return payload.result;

// ---- reductions: half is summed in float ----

#define EMU_REDUCE(name, first_lane, width, step)                                                                   \
  template <class T, enable_if_t<is_arithmetic_v<T>, int> = 0> EMU_FN T name(T value, EMU_SITE) {                    \
    emu_simd_type<T>();                                                                                             \
    const uint operand = 0;                                                                                         \
    EMU_ALL_LANES(T, #name,                                                                                         \
      using A = conditional_t<is_floating_point_v<T>, float, T>;                                                    \
      for (int begin = 0; begin < 32; begin += width) {                                                             \
        bool first = true; A all = 0;                                                                               \
        for (int i = begin; i < begin + width; i++) if (mask >> i & 1) {                                            \
          A v = (A)p[i]->value;                                                                                     \
          if (first) { all = v; first = false; } else { step; }                                                     \
        }                                                                                                           \
        for (int i = begin; i < begin + width; i++) if (mask >> i & 1) p[i]->result = (T)all;                       \
      })                                                                                                            \
  }                                                                                                                 \
  template <class T, int N> EMU_FN vec<T, N> name(vec<T, N> v, EMU_SITE) {                                           \
    for (int i = 0; i < N; i++) v[i] = name(v[i], emu_file, emu_line);                                              \
    return v;                                                                                                       \
  }
#define EMU_REDUCE_BOTH(name, step) EMU_REDUCE(simd_##name, 0, 32, step) EMU_REDUCE(quad_##name, 0, 4, step)
EMU_REDUCE_BOTH(sum, all = (A)(all + v)) EMU_REDUCE_BOTH(product, all = (A)(all * v))
EMU_REDUCE_BOTH(max, all = v > all || all != all ? v : all) EMU_REDUCE_BOTH(min, all = v < all || all != all ? v : all)
#define EMU_REDUCE_BITS(name, op)                                                                                    \
  template <class T, emu_if_integer<T> = 0> EMU_FN T name(T value, EMU_SITE) {                                       \
    emu_simd_type<T>();                                                                                              \
    const uint operand = 0;                                                                                          \
    EMU_ALL_LANES(T, #name, T all = p[__builtin_ctz(mask)]->value; EMU_LANES(i) if (i != __builtin_ctz(mask)) all op p[i]->value; \
                  EMU_LANES(i) p[i]->result = all;)                                                                  \
  }
EMU_REDUCE_BITS(simd_and, &=) EMU_REDUCE_BITS(simd_or, |=) EMU_REDUCE_BITS(simd_xor, ^=)

#define EMU_SCAN(name, op, identity, exclusive)                                                                      \
  template <class T> EMU_FN T name(T value, EMU_SITE) {                                                              \
    emu_simd_type<T>();                                                                                              \
    const uint operand = 0;                                                                                          \
    EMU_ALL_LANES(T, #name, T all = (T)identity; EMU_LANES(i) {                                                      \
      if (exclusive) p[i]->result = all;                                                                             \
      all = (T)(all op p[i]->value);                                                                                 \
      if (!exclusive) p[i]->result = all;                                                                            \
    })                                                                                                               \
  }
EMU_SCAN(simd_prefix_exclusive_sum, +, 0, true) EMU_SCAN(simd_prefix_inclusive_sum, +, 0, false)
EMU_SCAN(simd_prefix_exclusive_product, *, 1, true) EMU_SCAN(simd_prefix_inclusive_product, *, 1, false)

// ---- exchange ----
// Reading a lane that does not take part, or an operand that must be the same in all lanes and is not, is undefined in MSL:
// both are reported. Shifts leave the lanes that have no source as they are.

template <class T> EMU_FN T emu_undefined() {
  T t;
  __builtin_memset((void*)&t, 0xFF, sizeof t);
  emu_inactive_lane_read();
  return t;
}
#define EMU_SHUFFLE(name, uniform, source)                                                                           \
  template <class T> EMU_FN T name(T value, ushort operand, EMU_SITE) {                                              \
    emu_simd_type<T>();                                                                                              \
    EMU_ALL_LANES(T, #name,                                                                                          \
      uint first = p[__builtin_ctz(mask)]->operand;                                                                  \
      EMU_LANES(i) {                                                                                                 \
        int a = (int)p[i]->operand, from = (source);                                                                 \
        if (uniform && p[i]->operand != first) emu_operands_differ();                                                \
        if (from == EMU_STAYS) p[i]->result = p[i]->value;                                                           \
        else if (from < 0 || from > 31 || !(mask >> from & 1)) p[i]->result = emu_undefined<T>();                    \
        else p[i]->result = p[from]->value;                                                                          \
      })                                                                                                             \
  }
#define EMU_STAYS 1000
EMU_SHUFFLE(simd_shuffle, false, a) EMU_SHUFFLE(simd_shuffle_xor, true, i ^ a) EMU_SHUFFLE(simd_broadcast, true, a)
EMU_SHUFFLE(simd_shuffle_down, true, i + a < 32 ? i + a : EMU_STAYS) EMU_SHUFFLE(simd_shuffle_up, true, i >= a ? i - a : EMU_STAYS)
EMU_SHUFFLE(simd_shuffle_rotate_down, true, (i + a) & 31) EMU_SHUFFLE(simd_shuffle_rotate_up, true, (i - a) & 31)
EMU_SHUFFLE(quad_shuffle, false, a < 4 ? (i & ~3) | a : -1) EMU_SHUFFLE(quad_shuffle_xor, true, a < 4 ? i ^ a : -1)
EMU_SHUFFLE(quad_broadcast, true, a < 4 ? (i & ~3) | a : -1)
EMU_SHUFFLE(quad_shuffle_down, true, (i & 3) + a < 4 ? i + a : EMU_STAYS) EMU_SHUFFLE(quad_shuffle_up, true, (i & 3) >= a ? i - a : EMU_STAYS)
template <class T> EMU_FN T simd_broadcast_first(T value, EMU_SITE) {
  emu_simd_type<T>();
  const uint operand = 0;
  EMU_ALL_LANES(T, "simd_broadcast_first", int first = __builtin_ctz(mask); EMU_LANES(i) p[i]->result = p[first]->value;)
}
template <class T> struct emu_fill { T value, fill, result; uint operand; };
#define EMU_SHUFFLE_FILL(name, source, outside)                                                                      \
  template <class T> EMU_FN T name(T value, T fill, ushort operand, EMU_SITE) {                                      \
    emu_simd_type<T>();                                                                                              \
    emu_fill<T> payload{value, fill, value, operand};                                                                \
    emu_simd([](void** payloads, uint mask) __attribute__((nodebug)) {                                               \
        emu_fill<T>** p = (emu_fill<T>**)payloads;                                                                   \
        EMU_LANES(i) {                                                                                               \
          int a = (int)p[i]->operand, from = (source), other = from & 31;                                            \
          bool fills = (outside);                                                                                    \
          p[i]->result = !(mask >> other & 1) ? emu_undefined<T>() : fills ? p[other]->fill : p[from]->value;        \
        }                                                                                                            \
      }, &payload, #name, emu_file, emu_line);                                                                       \
    return payload.result;                                                                                           \
  }
EMU_SHUFFLE_FILL(simd_shuffle_and_fill_down, i + a, from > 31) EMU_SHUFFLE_FILL(simd_shuffle_and_fill_up, i - a, from < 0)

// ---- votes ----

#define EMU_VOTE(R, name, ...)                                                       \
  EMU_FN R emu_##name(ulong value, const char* emu_file, int emu_line) {             \
    const uint operand = 0;                                                          \
    EMU_ALL_LANES(ulong, #name, ulong all = 0; EMU_LANES(i) all |= p[i]->value << i; \
                  EMU_LANES(i) p[i]->result = (__VA_ARGS__);)                        \
  }
EMU_VOTE(ulong, simd_ballot, all)
EMU_VOTE(bool, simd_all, all == mask)
EMU_VOTE(bool, simd_any, all != 0)
EMU_VOTE(bool, simd_is_first, i == __builtin_ctz(mask))
struct simd_vote {
  using vote_t = ulong;
  vote_t emu_votes;
  EMU_FN constexpr explicit simd_vote(vote_t votes = 0) : emu_votes(votes) {}
  EMU_FN constexpr explicit operator vote_t() const { return emu_votes; }
  EMU_FN bool all() const { return (uint)emu_votes == 0xFFFFFFFFu; }
  EMU_FN bool any() const { return emu_votes != 0; }
};
EMU_FN simd_vote simd_ballot(bool vote, EMU_SITE) { return simd_vote(emu_simd_ballot(vote, emu_file, emu_line)); }
EMU_FN simd_vote simd_active_threads_mask(EMU_SITE) { return simd_vote(emu_simd_ballot(1, emu_file, emu_line)); }
EMU_FN bool simd_all(bool vote, EMU_SITE) { return emu_simd_all(vote, emu_file, emu_line); }
EMU_FN bool simd_any(bool vote, EMU_SITE) { return emu_simd_any(vote, emu_file, emu_line); }
EMU_FN bool simd_is_first(EMU_SITE) { return emu_simd_is_first(1, emu_file, emu_line); }
}  // namespace metal
