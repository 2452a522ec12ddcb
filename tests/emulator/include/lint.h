// Declarations only, for checking the types of MSL as C++ for OpenCL (clang -x clcpp), which has MSL's address spaces:
//   device = __global, threadgroup = __local, constant = __constant, thread = __private,
// with methods qualified by them, and with a generic address space (Metal 4.1) or without one (before).
#pragma once
#pragma OPENCL EXTENSION cl_khr_fp16 : enable
#pragma OPENCL EXTENSION __cl_clang_function_pointers : enable
#define device __global
#define threadgroup __local
#define constant const __constant  // implies const, as in MSL; behind a method, front.py writes __constant
#define thread __private
#define kernel
// keywords and types of OpenCL that are plain names in MSL
#define local emu_name_local
#define global emu_name_global
#define generic emu_name_generic
#define pipe emu_name_pipe
#define atomic_int emu_name_atomic_int
#define atomic_uint emu_name_atomic_uint
#define atomic_float emu_name_atomic_float
#define atomic_ulong emu_name_atomic_ulong
#define atomic_bool emu_name_atomic_bool
#define event_t emu_name_event_t
#define sampler_t emu_name_sampler_t
typedef __SIZE_TYPE__ size_t;
typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __INTPTR_TYPE__ intptr_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef signed char int8_t;
typedef unsigned char uint8_t, uchar;
typedef short int16_t;
typedef unsigned short uint16_t, ushort;
typedef int int32_t;
typedef unsigned int uint32_t, uint;
typedef long int64_t;
typedef unsigned long uint64_t, ulong;
typedef __bf16 bfloat;
#define METAL_FUNC inline
#include "msl_constants.h"

namespace metal {
using ::bfloat;
using ::int16_t; using ::int32_t; using ::int64_t; using ::int8_t;
using ::uint16_t; using ::uint32_t; using ::uint64_t; using ::uint8_t;
using ::size_t; using ::uchar; using ::uint; using ::ulong; using ::ushort;
#include "msl_traits.h"
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
template <class T, int N> struct packed_vec { T d[N]; packed_vec() = default; packed_vec(vec<T, N>); operator vec<T, N>() const; };
template <class T> struct emu_v { static constexpr constant int n = 1; using t = T; };
template <class T, int N> struct emu_v<T __attribute__((ext_vector_type(N)))> { static constexpr constant int n = N; using t = T; };
template <class T> inline constexpr constant bool is_vector_v = (emu_v<T>::n > 1);
template <class T> inline constexpr constant bool is_scalar_v = is_arithmetic_v<T>;
template <class T, size_t N> struct array { T __elems[N]; constexpr T operator[](size_t i) const { return __elems[i]; } thread T& operator[](size_t i) thread; };
}
#define LINT_VECTORS(T)                                                                                   \
  using T##2 = metal::vec<T, 2>; using T##3 = metal::vec<T, 3>; using T##4 = metal::vec<T, 4>;            \
  using packed_##T##2 = metal::packed_vec<T, 2>; using packed_##T##3 = metal::packed_vec<T, 3>;           \
  using packed_##T##4 = metal::packed_vec<T, 4>;                                                          \
  namespace metal { using ::T##2; using ::T##3; using ::T##4; }
LINT_VECTORS(char) LINT_VECTORS(uchar) LINT_VECTORS(short) LINT_VECTORS(ushort) LINT_VECTORS(int) LINT_VECTORS(uint)
LINT_VECTORS(long) LINT_VECTORS(ulong) LINT_VECTORS(half) LINT_VECTORS(float) LINT_VECTORS(bfloat)
using bool2 = char2;  // OpenCL has no vectors of bool
using bool3 = char3;
using bool4 = char4;
// lint.py rewrites T(arguments) to this for the names of vectors.
template <class V, class... A> constexpr V emu_make(A... a) {
  static_assert(sizeof...(A) == 1 || (metal::emu_v<A>::n + ...) == metal::emu_v<V>::n, "number of vector components");
  return V(0);
}
template <class To, class From> constexpr To as_type(From f) {
  static_assert(sizeof(To) == sizeof(From), "as_type<>: the sizes differ");
  return __builtin_bit_cast(To, f);
}

namespace metal {
using ::as_type;
// ---- math: bfloat has no functions of its own ----
template <class T> using emu_float = conditional_t<is_same_v<T, bfloat> || is_integral_v<T>, float, T>;
#define LINT_F1(n) template <class T> emu_float<T> n(T);
#define LINT_F2(n) template <class T> emu_float<T> n(T, T); template <class A, class B, enable_if_t<!is_same_v<A, B>, int> = 0> float n(A, B);
#define LINT_ALL1(X) X(exp) X(exp2) X(exp10) X(log) X(log2) X(log10) X(sqrt) X(rsqrt) X(sin) X(cos) X(tan) X(asin) X(acos) X(atan) X(sinh) X(cosh) \
  X(tanh) X(asinh) X(acosh) X(atanh) X(floor) X(ceil) X(trunc) X(rint) X(round) X(fabs) X(fract) X(saturate) X(sinpi) X(cospi)
#define LINT_ALL2(X) X(pow) X(powr) X(atan2) X(fmod) X(fmin) X(fmax) X(copysign) X(nextafter) X(fdim) X(divide) X(step)
LINT_ALL1(LINT_F1) LINT_ALL2(LINT_F2)
template <class T> T fma(T, T, T); template <class T> T ldexp(T, int); template <class T> T frexp(T, thread int&);
template <class T> T modf(T, thread T&); template <class T> T sincos(T, thread T&); template <class T> int ilogb(T);
template <class T> bool isnan(T); template <class T> bool isinf(T); template <class T> bool isfinite(T); template <class T> bool isnormal(T); template <class T> bool signbit(T);
template <class T> constexpr T abs(T x) { return x; } template <class T> T sign(T);
template <class T> constexpr T min(T a, T) { return a; } template <class T> constexpr T max(T a, T) { return a; }
template <class A, class B, enable_if_t<!is_same_v<A, B>, int> = 0> constexpr auto min(A a, B b) { return a + b; }
template <class A, class B, enable_if_t<!is_same_v<A, B>, int> = 0> constexpr auto max(A a, B b) { return a + b; }
template <class T> T min3(T, T, T); template <class T> T max3(T, T, T); template <class T, class B, class C> T clamp(T, B, C);
template <class T, class U> T mix(T, T, U); template <class T, class C> T select(T, T, C);
template <class T> bool all(T); template <class T> bool any(T); template <class V> typename emu_v<V>::t dot(V, V); template <class V> typename emu_v<V>::t length(V);
template <class V> typename emu_v<V>::t length_squared(V); template <class V> V normalize(V);
template <class T> T popcount(T); template <class T> T clz(T); template <class T> T ctz(T); template <class T> T reverse_bits(T); template <class T> T mulhi(T, T);
template <class T> T mul24(T, T); template <class T> T mad24(T, T, T); template <class T> T rotate(T, T); template <class T> T extract_bits(T, uint, uint);
template <class T> T insert_bits(T, T, uint, uint); template <class T> T absdiff(T, T); template <class T> T addsat(T, T); template <class T> T subsat(T, T); template <class T> T hadd(T, T);
#define LINT_USE(n) using metal::n;
#define LINT_NAMESPACE { LINT_ALL1(LINT_USE) LINT_ALL2(LINT_USE) using metal::min; using metal::max; using metal::clamp; using metal::fma; using metal::sincos; }
namespace fast LINT_NAMESPACE
namespace precise LINT_NAMESPACE
float2 unpack_half2x16_to_float(uint); half2 unpack_half2x16_to_half(uint); uint pack_float_to_half2x16(float2); uint pack_half_to_half2x16(half2);

// ---- synchronization, simdgroups ----
enum class mem_flags : uint { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
constexpr mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(uint(a) | uint(b)); }
enum memory_order { memory_order_relaxed, memory_order_acquire, memory_order_release, memory_order_acq_rel, memory_order_seq_cst };
enum thread_scope { thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device };
void threadgroup_barrier(mem_flags); void simdgroup_barrier(mem_flags); void atomic_thread_fence(mem_flags, memory_order, thread_scope = thread_scope_device);
#define LINT_S1(n) template <class T> conditional_t<is_same_v<T, bfloat>, float, T> n(T);
#define LINT_S2(n) template <class T> T n(T, ushort);
LINT_S1(simd_sum) LINT_S1(simd_product) LINT_S1(simd_max) LINT_S1(simd_min) LINT_S1(simd_and) LINT_S1(simd_or) LINT_S1(simd_xor)
LINT_S1(quad_sum) LINT_S1(quad_product) LINT_S1(quad_max) LINT_S1(quad_min) LINT_S1(simd_broadcast_first)
LINT_S1(simd_prefix_exclusive_sum) LINT_S1(simd_prefix_inclusive_sum) LINT_S1(simd_prefix_exclusive_product) LINT_S1(simd_prefix_inclusive_product)
LINT_S2(simd_shuffle) LINT_S2(simd_shuffle_xor) LINT_S2(simd_shuffle_down) LINT_S2(simd_shuffle_up) LINT_S2(simd_shuffle_rotate_down)
LINT_S2(simd_shuffle_rotate_up) LINT_S2(simd_broadcast) LINT_S2(quad_shuffle) LINT_S2(quad_shuffle_xor) LINT_S2(quad_shuffle_down)
LINT_S2(quad_shuffle_up) LINT_S2(quad_broadcast)
template <class T> T simd_shuffle_and_fill_down(T, T, ushort); template <class T> T simd_shuffle_and_fill_up(T, T, ushort);
bool simd_all(bool); bool simd_any(bool); bool simd_is_first();
struct simd_vote { using vote_t = ulong; vote_t v; explicit simd_vote(vote_t); explicit operator vote_t() const; bool all() const; bool any() const; };
simd_vote simd_ballot(bool); simd_vote simd_active_threads_mask();

// ---- matrices and atomics: in device and threadgroup memory only ----
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8 x 8 simdgroup matrices only");
  vec<T, 2> e;
  simdgroup_matrix() = default;
  explicit simdgroup_matrix(T);
  thread vec<T, 2>& thread_elements() thread;
  const thread vec<T, 2>& thread_elements() const thread;
};
template <class T, int R, int C> simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T);
#define LINT_MATRIX(SPACE)                                                                                                            \
  template <class T> void simdgroup_load(thread simdgroup_matrix<T, 8, 8>&, const SPACE T*, ulong = 8, ulong2 = 0, bool = false);     \
  template <class T> void simdgroup_store(const thread simdgroup_matrix<T, 8, 8>&, SPACE T*, ulong = 8, ulong2 = 0, bool = false);
LINT_MATRIX(device) LINT_MATRIX(threadgroup)
template <class D, class A, class B, class C> void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8>&,
  const thread simdgroup_matrix<A, 8, 8>&, const thread simdgroup_matrix<B, 8, 8>&, const thread simdgroup_matrix<C, 8, 8>&);
template <class D, class A, class B> void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8>&, const thread simdgroup_matrix<A, 8, 8>&,
  const thread simdgroup_matrix<B, 8, 8>&);
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

template <class T> struct atomic { T v; };
template <class T> using _atomic = atomic<T>;
using atomic_int = atomic<int>;
using atomic_uint = atomic<uint>;
using atomic_bool = atomic<bool>;
using atomic_float = atomic<float>;
#define LINT_FETCH(SPACE, n) template <class T, class U> T n(volatile SPACE atomic<T>*, U, memory_order);
#define LINT_ATOMIC(SPACE)                                                                                                            \
  template <class T> T atomic_load_explicit(const volatile SPACE atomic<T>*, memory_order);                                           \
  template <class T, class U> void atomic_store_explicit(volatile SPACE atomic<T>*, U, memory_order);                                 \
  template <class T, class U>                                                                                                         \
  bool atomic_compare_exchange_weak_explicit(volatile SPACE atomic<T>*, thread T*, U, memory_order, memory_order);                    \
  LINT_FETCH(SPACE, atomic_exchange_explicit) LINT_FETCH(SPACE, atomic_fetch_add_explicit) LINT_FETCH(SPACE, atomic_fetch_sub_explicit) \
  LINT_FETCH(SPACE, atomic_fetch_max_explicit) LINT_FETCH(SPACE, atomic_fetch_min_explicit) LINT_FETCH(SPACE, atomic_fetch_and_explicit) \
  LINT_FETCH(SPACE, atomic_fetch_or_explicit) LINT_FETCH(SPACE, atomic_fetch_xor_explicit)
LINT_ATOMIC(device) LINT_ATOMIC(threadgroup)
}  // namespace metal
using metal::simdgroup_matrix;
#define EMU_THREADGROUP(name, ...)    \
  using emu_type_##name = __VA_ARGS__; \
  threadgroup emu_type_##name& name = *(threadgroup emu_type_##name*)(size_t)16
