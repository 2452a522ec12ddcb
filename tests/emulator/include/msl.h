// The Metal standard library as plain C++17, force-included in front of a rewritten .metal text.
// No system header is pulled in, so that nothing but MSL's own names exists: erf, double or std:: do not compile.
// Address spaces are erased here; lint.h checks them in a second pass. EMU_FN functions leave no trace in the line table,
// so that a report names the kernel's line and not one of these headers.
#pragma once

#define EMU_FN __attribute__((always_inline, nodebug)) inline

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
typedef _Float16 half;

#include "abi.h"

#define device
#define constant const  // MSL's constant implies const
#define threadgroup
#define thread
#define kernel
#define METAL_FUNC inline __attribute__((always_inline))
#include "msl_constants.h"

// ---- bfloat ----
// Converts to float by itself; of other types only integers convert to it. Rounds to nearest even, in integers, since the
// compiler's own conversion wants a library or AVX-512.
EMU_FN constexpr ushort emu_bfloat_bits(float f) {
  uint u = __builtin_bit_cast(uint, f);
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) return (ushort)(u >> 16 | 0x40);
  return (ushort)((u + 0x7FFFu + (u >> 16 & 1)) >> 16);
}
template <bool> struct emu_condition {};
template <> struct emu_condition<true> { using type = int; };
template <bool B> using emu_only = typename emu_condition<B>::type;
struct bfloat {
  ushort emu_bits;
  bfloat() = default;
  template <class I, emu_only<__is_integral(I)> = 0> EMU_FN constexpr bfloat(I i) : emu_bits(emu_bfloat_bits((float)i)) {}
  EMU_FN explicit constexpr bfloat(float f) : emu_bits(emu_bfloat_bits(f)) {}
  EMU_FN explicit constexpr bfloat(half f) : emu_bits(emu_bfloat_bits((float)f)) {}
  EMU_FN constexpr operator float() const { return __builtin_bit_cast(float, (uint)emu_bits << 16); }
};

#pragma clang diagnostic ignored "-Wuser-defined-literals"
EMU_FN constexpr half operator""h(long double x) { return (half)x; }
EMU_FN constexpr half operator""h(unsigned long long x) { return (half)x; }
EMU_FN constexpr half operator""H(long double x) { return (half)x; }
EMU_FN constexpr bfloat operator""bf(long double x) { return (bfloat)(float)x; }
EMU_FN constexpr bfloat operator""BF(long double x) { return (bfloat)(float)x; }

namespace metal {
using ::bfloat;
using ::half;
using ::int16_t;
using ::int32_t;
using ::int64_t;
using ::int8_t;
using ::ptrdiff_t;
using ::size_t;
using ::uchar;
using ::uint;
using ::uint16_t;
using ::uint32_t;
using ::uint64_t;
using ::uint8_t;
using ::ulong;
using ::ushort;
#include "msl_traits.h"
}  // namespace metal

// bfloat with bfloat or an integer stays bfloat; with another floating type it is float.
#define EMU_BFLOAT(op)                                                                                                    \
  EMU_FN constexpr bfloat operator op(bfloat a, bfloat b) { return bfloat((float)a op(float) b); }                        \
  template <class I, metal::enable_if_t<metal::is_integral_v<I>, int> = 0>                                                \
  EMU_FN constexpr bfloat operator op(bfloat a, I b) { return bfloat((float)a op(float) b); }                             \
  template <class I, metal::enable_if_t<metal::is_integral_v<I>, int> = 0>                                                \
  EMU_FN constexpr bfloat operator op(I a, bfloat b) { return bfloat((float)a op(float) b); }                             \
  template <class F, metal::enable_if_t<metal::is_same_v<F, float> || metal::is_same_v<F, half>, int> = 0>                \
  EMU_FN constexpr float operator op(bfloat a, F b) { return (float)a op(float) b; }                                      \
  template <class F, metal::enable_if_t<metal::is_same_v<F, float> || metal::is_same_v<F, half>, int> = 0>                \
  EMU_FN constexpr float operator op(F a, bfloat b) { return (float)a op(float) b; }                                      \
  EMU_FN constexpr bfloat& operator op##=(bfloat& a, float b) { return a = bfloat((float)a op b); }
EMU_BFLOAT(+) EMU_BFLOAT(-) EMU_BFLOAT(*) EMU_BFLOAT(/)
EMU_FN constexpr bfloat operator-(bfloat a) { return bfloat(-(float)a); }

#include "msl_vector.h"
#include "msl_math.h"
#include "msl_simd.h"
#include "msl_matrix.h"
#include "msl_atomic.h"
#include "msl_kernel.h"
