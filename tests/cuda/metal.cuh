// What the kernels in metal/ use of Metal's standard library, as CUDA C++: a simdgroup is a warp, a threadgroup a block.
// run.py puts this before a kernel file's text. Written to be right and simple, not fast. MM_POISON: threadgroup memory
// starts as NaN, so that a read before the first write shows in the result.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

typedef unsigned int uint;
typedef unsigned short ushort;
typedef unsigned long ulong;
typedef __nv_bfloat16 bfloat;
static_assert(sizeof(long) == 8 && sizeof(ulong) == 8, "Metal's long has 8 bytes");

#define MM_DEVICE static __device__ __forceinline__
#define MM_ALL 0xFFFFFFFFu
#undef NAN
#undef INFINITY
#define NAN __int_as_float(0x7FC00000)
#define INFINITY __int_as_float(0x7F800000)

namespace metal {}

// ---- threadgroup memory ----

// 16 bytes: the kernels read float4 from float arrays.
#define MM_THREADGROUP __shared__ __align__(16)

MM_DEVICE void mm_poison(void* memory, uint size) {
#ifdef MM_POISON
  for (uint i = threadIdx.x; i < size; i += blockDim.x) ((unsigned char*)memory)[i] = 0xFF;
  __syncthreads();
#endif
}

// ---- scalars and vectors ----

template <typename To, typename From>
MM_DEVICE To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

MM_DEVICE half fma(half a, half b, half c) { return __hfma(a, b, c); }  // one rounding

// Vectors, without swizzles. A scalar becomes a vector where one is wanted.
#define MM_OPERATORS(vector)                                                                                     \
  __device__ T& operator[](uint i) { return (&x)[i]; }                                                           \
  __device__ T operator[](uint i) const { return (&x)[i]; }                                                      \
  friend __device__ vector operator+(vector a, vector b) { return each(a, b, [](T l, T r) { return T(l + r); }); } \
  friend __device__ vector operator-(vector a, vector b) { return each(a, b, [](T l, T r) { return T(l - r); }); } \
  friend __device__ vector operator*(vector a, vector b) { return each(a, b, [](T l, T r) { return T(l * r); }); } \
  friend __device__ vector operator/(vector a, vector b) { return each(a, b, [](T l, T r) { return T(l / r); }); } \
  friend __device__ vector& operator+=(vector& a, vector b) { return a = a + b; }                                \
  friend __device__ vector& operator-=(vector& a, vector b) { return a = a - b; }                                \
  friend __device__ vector& operator*=(vector& a, vector b) { return a = a * b; }

template <typename T>
struct alignas(2 * sizeof(T)) mm_vector2 {
  T x, y;
  mm_vector2() = default;
  __device__ mm_vector2(T all) : x(all), y(all) {}
  __device__ mm_vector2(T a, T b) : x(a), y(b) {}
  template <typename F>
  static __device__ mm_vector2 each(mm_vector2 a, mm_vector2 b, F f) {
    return mm_vector2(f(a.x, b.x), f(a.y, b.y));
  }
  MM_OPERATORS(mm_vector2)
};

template <typename T>
struct alignas(4 * sizeof(T)) mm_vector4 {
  T x, y, z, w;
  mm_vector4() = default;
  __device__ mm_vector4(T all) : x(all), y(all), z(all), w(all) {}
  __device__ mm_vector4(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
  template <typename F>
  static __device__ mm_vector4 each(mm_vector4 a, mm_vector4 b, F f) {
    return mm_vector4(f(a.x, b.x), f(a.y, b.y), f(a.z, b.z), f(a.w, b.w));
  }
  MM_OPERATORS(mm_vector4)
};
#undef MM_OPERATORS

// ---- simdgroup functions: all 32 lanes take part ----

template <typename T>
MM_DEVICE T simd_shuffle(T value, ushort lane) {
  return __shfl_sync(MM_ALL, value, lane);
}

template <typename T>
MM_DEVICE T simd_shuffle_xor(T value, ushort mask) {
  return __shfl_xor_sync(MM_ALL, value, mask);
}

template <typename T>
MM_DEVICE T simd_sum(T value) {
  for (uint bit = 1; bit < 32; bit *= 2) value += __shfl_xor_sync(MM_ALL, value, bit);
  return value;
}

MM_DEVICE float simd_max(float value) {
  for (uint bit = 1; bit < 32; bit *= 2) value = fmaxf(value, __shfl_xor_sync(MM_ALL, value, bit));
  return value;
}

template <typename T>
MM_DEVICE T simd_prefix_exclusive_sum(T value) {
  T before = 0;
  for (uint lane = 0; lane < 32; lane++) {
    T other = __shfl_sync(MM_ALL, value, lane);
    if (lane < (threadIdx.x & 31)) before += other;
  }
  return before;
}

// ---- barriers ----

enum class mem_flags { mem_none, mem_device, mem_threadgroup };

MM_DEVICE void threadgroup_barrier(mem_flags) { __syncthreads(); }
MM_DEVICE void simdgroup_barrier(mem_flags) { __syncwarp(); }

// ---- simdgroup_matrix: lane l holds (row, column) = (l / 4, 2 (l % 4)) and its right neighbour ----

template <typename T, int ROWS, int COLUMNS>
struct simdgroup_matrix {
  static_assert(ROWS == 8 && COLUMNS == 8, "8 x 8 only");
  T part[2];
};

template <typename T, int ROWS, int COLUMNS>
MM_DEVICE simdgroup_matrix<T, ROWS, COLUMNS> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, ROWS, COLUMNS> m;
  m.part[0] = m.part[1] = value;
  return m;
}

template <typename T>
MM_DEVICE void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong elements_per_row) {
  uint lane = threadIdx.x & 31;
  for (uint i = 0; i < 2; i++) m.part[i] = from[lane / 4 * elements_per_row + lane % 4 * 2 + i];
}

template <typename T>
MM_DEVICE void simdgroup_store(simdgroup_matrix<T, 8, 8> m, T* to, ulong elements_per_row) {
  uint lane = threadIdx.x & 31;
  for (uint i = 0; i < 2; i++) to[lane / 4 * elements_per_row + lane % 4 * 2 + i] = m.part[i];
}

// d = a b + c
template <typename T>
MM_DEVICE void simdgroup_multiply_accumulate(simdgroup_matrix<T, 8, 8>& d, simdgroup_matrix<T, 8, 8> a,
                                             simdgroup_matrix<T, 8, 8> b, simdgroup_matrix<T, 8, 8> c) {
  uint row = (threadIdx.x & 31) / 4, pair = threadIdx.x & 3;
  for (uint k = 0; k < 8; k++) {
    T left = __shfl_sync(MM_ALL, a.part[k & 1], row * 4 + k / 2);
    for (uint i = 0; i < 2; i++) {
      T right = __shfl_sync(MM_ALL, b.part[i], k * 4 + pair);
      c.part[i] = c.part[i] + left * right;
    }
  }
  d = c;
}

// ---- atomics ----

enum memory_order { memory_order_relaxed };
struct atomic_uint {
  uint value;
};
MM_DEVICE void atomic_store_explicit(atomic_uint* a, uint value, memory_order) { atomicExch(&a->value, value); }
MM_DEVICE uint atomic_load_explicit(atomic_uint* a, memory_order) { return atomicAdd(&a->value, 0u); }
MM_DEVICE uint atomic_fetch_add_explicit(atomic_uint* a, uint value, memory_order) {
  return atomicAdd(&a->value, value);
}

// ---- names that CUDA has for other types; last, so that no header above sees them ----

#define float2 mm_vector2<float>
#define float4 mm_vector4<float>
#define half2 mm_vector2<half>
#define half4 mm_vector4<half>
#define uint2 mm_vector2<uint>
#define uint4 mm_vector4<uint>
#define ushort2 mm_vector2<ushort>
#define ushort4 mm_vector4<ushort>
