// <metal_atomic>: relaxed atomics on int, uint, float and bool. Memory here is sequentially consistent, so what a missing
// fence does on a GPU cannot be seen; the race check treats atomic accesses as not racing with one another.
#pragma once
namespace metal {
template <class T> struct atomic {
  static_assert(sizeof(T) == 4 || is_same_v<T, bool>, "atomics of int, uint, float and bool only");
  T emu_value;
};
template <class T> using _atomic = atomic<T>;
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_float = atomic<float>;
using atomic_bool = atomic<bool>;

#define EMU_TOUCH(writes) emu_atomic_access((const void*)p, sizeof(T), writes)
#define EMU_VALUE ((T*)&p->emu_value)
template <class T> EMU_FN T atomic_load_explicit(const volatile atomic<T>* p, memory_order) {
  T now;
  EMU_TOUCH(0);
  __atomic_load(EMU_VALUE, &now, __ATOMIC_RELAXED);
  return now;
}
template <class T, class U> EMU_FN void atomic_store_explicit(volatile atomic<T>* p, U value, memory_order) {
  T next = (T)value;
  EMU_TOUCH(2);
  __atomic_store(EMU_VALUE, &next, __ATOMIC_RELAXED);
}
template <class T, class U> EMU_FN T atomic_exchange_explicit(volatile atomic<T>* p, U value, memory_order) {
  T next = (T)value, before;
  EMU_TOUCH(1);
  __atomic_exchange(EMU_VALUE, &next, &before, __ATOMIC_RELAXED);
  return before;
}
template <class T, class U>
EMU_FN bool atomic_compare_exchange_weak_explicit(volatile atomic<T>* p, T* expected, U value, memory_order, memory_order) {
  T next = (T)value;
  EMU_TOUCH(1);
  return __atomic_compare_exchange(EMU_VALUE, expected, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}
#define EMU_FETCH(name, expression)                                                                   \
  template <class T, class U> EMU_FN T name(volatile atomic<T>* p, U operand, memory_order) {         \
    T value = (T)operand, before, next;                                                               \
    EMU_TOUCH(1);                                                                                     \
    __atomic_load(EMU_VALUE, &before, __ATOMIC_RELAXED);                                              \
    do next = (T)(expression);                                                                        \
    while (!__atomic_compare_exchange(EMU_VALUE, &before, &next, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)); \
    return before;                                                                                    \
  }
EMU_FETCH(atomic_fetch_add_explicit, before + value) EMU_FETCH(atomic_fetch_sub_explicit, before - value)
EMU_FETCH(atomic_fetch_max_explicit, before < value ? value : before) EMU_FETCH(atomic_fetch_min_explicit, value < before ? value : before)
EMU_FETCH(atomic_fetch_and_explicit, before & value) EMU_FETCH(atomic_fetch_or_explicit, before | value)
EMU_FETCH(atomic_fetch_xor_explicit, before ^ value)
}  // namespace metal
