// <metal_math>, <metal_common>, <metal_integer>, <metal_relational>. Scalar functions are sets of overloads, as Metal's are,
// so that a call which is ambiguous there (min(int, uint), exp(int), max(half, float)) does not compile here either; bfloat
// has no functions of its own and must be converted. Half is computed in float and rounded once. There is no fast math:
// fast:: and precise:: give the same values, and take float only.
#pragma once
namespace metal {
template <class T> using emu_if_bfloat = enable_if_t<is_same_v<T, bfloat>, int>;
template <class T> using emu_if_integer = enable_if_t<is_integral_v<T> && !is_same_v<T, bool>, int>;
#define EMU_MAP1(name) \
  template <class T, int N> EMU_FN auto name(const vec<T, N>& v) { vec<decltype(name(v[0])), N> r; for (int i = 0; i < N; i++) r[i] = name(v[i]); return r; }
#define EMU_MAP2(name) \
  template <class T, int N> EMU_FN vec<T, N> name(const vec<T, N>& a, const vec<T, N>& b) { vec<T, N> r; for (int i = 0; i < N; i++) r[i] = name(a[i], b[i]); return r; }

// ---- functions of one and two floats ----
// X(name, expression in x), X(name, expression in x and y)
#define EMU_FLOAT1(X)                                                                                                         \
  X(exp, __builtin_expf(x)) X(exp2, __builtin_exp2f(x)) X(exp10, __builtin_powf(10.0f, x)) X(log, __builtin_logf(x))          \
  X(log2, __builtin_log2f(x)) X(log10, __builtin_log10f(x)) X(sqrt, __builtin_sqrtf(x)) X(rsqrt, 1.0f / __builtin_sqrtf(x))   \
  X(sin, __builtin_sinf(x)) X(cos, __builtin_cosf(x)) X(tan, __builtin_tanf(x)) X(asin, __builtin_asinf(x))                   \
  X(acos, __builtin_acosf(x)) X(atan, __builtin_atanf(x)) X(sinh, __builtin_sinhf(x)) X(cosh, __builtin_coshf(x))             \
  X(tanh, __builtin_tanhf(x)) X(asinh, __builtin_asinhf(x)) X(acosh, __builtin_acoshf(x)) X(atanh, __builtin_atanhf(x))       \
  X(floor, __builtin_floorf(x)) X(ceil, __builtin_ceilf(x)) X(trunc, __builtin_truncf(x)) X(rint, __builtin_rintf(x))         \
  X(round, __builtin_roundf(x)) X(fabs, __builtin_fabsf(x)) X(fract, x - __builtin_floorf(x))                                 \
  X(saturate, x < 0 ? 0.0f : x > 1 ? 1.0f : x) X(sinpi, __builtin_sinf(M_PI_F * x)) X(cospi, __builtin_cosf(M_PI_F * x))      \
  X(sign, x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f)
#define EMU_FLOAT2(X)                                                                                                         \
  X(pow, __builtin_powf(x, y)) X(powr, __builtin_powf(x, y)) X(atan2, __builtin_atan2f(x, y)) X(fmod, __builtin_fmodf(x, y))  \
  X(fmin, __builtin_fminf(x, y)) X(fmax, __builtin_fmaxf(x, y)) X(copysign, __builtin_copysignf(x, y))                        \
  X(nextafter, __builtin_nextafterf(x, y)) X(fdim, __builtin_fdimf(x, y)) X(divide, x / y) X(step, y < x ? 0.0f : 1.0f)
#define EMU_DEFINE1(name, expression)                                     \
  EMU_FN float name(float x) { return expression; }                       \
  EMU_FN half name(half h) { float x = h; return (half)(expression); }    \
  template <class T, emu_if_bfloat<T> = 0> float name(T) = delete;        \
  EMU_MAP1(name)
EMU_FLOAT1(EMU_DEFINE1)
#define EMU_DEFINE2(name, expression)                                                        \
  EMU_FN float name(float x, float y) { return expression; }                                 \
  EMU_FN half name(half a, half b) { float x = a, y = b; return (half)(expression); }        \
  template <class T, emu_if_bfloat<T> = 0> float name(T, T) = delete;                        \
  EMU_MAP2(name)
EMU_FLOAT2(EMU_DEFINE2)

EMU_FN float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// One rounding. The product and the sum are exact in double wherever the result is not infinite; on the way to half, the
// float in between is rounded to odd, which keeps it off the midpoints that a second rounding would get wrong.
EMU_FN half fma(half a, half b, half c) {
  double exact = __builtin_fma((double)a, (double)b, (double)c);
  float near = (float)exact;
  uint bits = as_type<uint>(near);
  if ((double)near != exact && near - near == 0.0f && !(bits & 1)) {
    bool down = near > 0 ? (double)near > exact : (double)near < exact;  // towards zero of what was rounded away from it
    bits = down ? bits - 1 : bits + 1;
  }
  return (half)as_type<float>(bits);
}
template <class T, int N> EMU_FN vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) EMU_EACH(EMU_TYPE(vec<T, N>), fma(a[i], b[i], c[i]))
EMU_FN float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
EMU_FN half ldexp(half x, int e) { return (half)__builtin_ldexpf(x, e); }
EMU_FN float frexp(float x, int& e) { return __builtin_frexpf(x, &e); }
EMU_FN float modf(float x, float& whole) { return __builtin_modff(x, &whole); }
EMU_FN float sincos(float x, float& c) { c = __builtin_cosf(x); return __builtin_sinf(x); }
EMU_FN int ilogb(float x) { return __builtin_ilogbf(x); }

// ---- questions about a float ----

#define EMU_ASK(name)                                                   \
  EMU_FN bool name(float x) { return __builtin_##name(x); }             \
  EMU_FN bool name(half x) { return __builtin_##name(x); }              \
  template <class T, emu_if_bfloat<T> = 0> bool name(T) = delete;       \
  EMU_MAP1(name)
EMU_ASK(isnan) EMU_ASK(isinf) EMU_ASK(isfinite) EMU_ASK(isnormal) EMU_ASK(signbit)

// ---- min, max, clamp, abs: one overload for each arithmetic type ----

#define EMU_NUMBERS(X) X(char) X(uchar) X(short) X(ushort) X(int) X(uint) X(long) X(ulong) X(half) X(float)
#define EMU_FLOATING(T) (is_same_v<T, half> || is_same_v<T, float>)
// A NaN operand is dropped, as by fmin and fmax.
#define EMU_ORDER(T)                                                                                                                \
  EMU_FN constexpr T min(T a, T b) { if constexpr (EMU_FLOATING(T)) { if (a != a) return b; if (b != b) return a; } return b < a ? b : a; } \
  EMU_FN constexpr T max(T a, T b) { if constexpr (EMU_FLOATING(T)) { if (a != a) return b; if (b != b) return a; } return a < b ? b : a; } \
  EMU_FN constexpr T clamp(T x, T low, T high) { return min(max(x, low), high); }                                                   \
  EMU_FN constexpr T min3(T a, T b, T c) { return min(a, min(b, c)); }                                                              \
  EMU_FN constexpr T max3(T a, T b, T c) { return max(a, max(b, c)); }
EMU_NUMBERS(EMU_ORDER)
#define EMU_NONE(T) \
  template <class T, emu_if_bfloat<T> = 0> T min(T, T) = delete; template <class T, emu_if_bfloat<T> = 0> T max(T, T) = delete; \
  template <class T, emu_if_bfloat<T> = 0> T clamp(T, T, T) = delete; template <class T, emu_if_bfloat<T> = 0> T abs(T) = delete;
EMU_NONE(T)
EMU_MAP2(min) EMU_MAP2(max)
template <class T, int N, EMU_SCALAR> EMU_FN vec<T, N> min(const vec<T, N>& a, S s) { return min(a, vec<T, N>(s)); }
template <class T, int N, EMU_SCALAR> EMU_FN vec<T, N> max(const vec<T, N>& a, S s) { return max(a, vec<T, N>(s)); }
template <class T, int N> EMU_FN vec<T, N> clamp(const vec<T, N>& x, const vec<T, N>& low, const vec<T, N>& high) { return min(max(x, low), high); }
template <class T, int N, EMU_SCALAR> EMU_FN vec<T, N> clamp(const vec<T, N>& x, S low, S high) { return clamp(x, vec<T, N>(low), vec<T, N>(high)); }
EMU_FN float abs(float x) { return __builtin_fabsf(x); }
EMU_FN half abs(half x) { return (half)__builtin_fabsf((float)x); }
#define EMU_ABS(T) EMU_FN constexpr T abs(T x) { return x < 0 ? (T)-x : x; }
EMU_ABS(char) EMU_ABS(short) EMU_ABS(int) EMU_ABS(long)
#define EMU_ABS_UNSIGNED(T) EMU_FN constexpr T abs(T x) { return x; }
EMU_ABS_UNSIGNED(uchar) EMU_ABS_UNSIGNED(ushort) EMU_ABS_UNSIGNED(uint) EMU_ABS_UNSIGNED(ulong)
EMU_MAP1(abs)
EMU_FN float mix(float a, float b, float t) { return a + (b - a) * t; }
EMU_FN half mix(half a, half b, half t) { return a + (b - a) * t; }
template <class T, int N> EMU_FN vec<T, N> mix(vec<T, N> a, vec<T, N> b, vec<T, N> t) { return a + (b - a) * t; }
template <class T, int N> EMU_FN vec<T, N> mix(vec<T, N> a, vec<T, N> b, T t) { return a + (b - a) * t; }

// ---- choices ----

template <class T, enable_if_t<!is_vector_v<T>, int> = 0> EMU_FN constexpr T select(T a, T b, bool c) { return c ? b : a; }
template <class T, int N> EMU_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) EMU_EACH(EMU_TYPE(vec<T, N>), c[i] ? b[i] : a[i])
template <class T, int N> EMU_FN vec<T, N> select(vec<T, N> a, vec<T, N> b, bool c) { return c ? b : a; }
EMU_FN bool all(bool b) { return b; }
EMU_FN bool any(bool b) { return b; }
template <int N> EMU_FN bool all(vec<bool, N> v) { bool r = true; for (int i = 0; i < N; i++) r &= v[i]; return r; }
template <int N> EMU_FN bool any(vec<bool, N> v) { bool r = false; for (int i = 0; i < N; i++) r |= v[i]; return r; }

// ---- geometry ----

template <class T, int N> EMU_FN T dot(const vec<T, N>& a, const vec<T, N>& b) { T s = a[0] * b[0]; for (int i = 1; i < N; i++) s += a[i] * b[i]; return s; }
template <class T, int N> EMU_FN T length_squared(const vec<T, N>& a) { return dot(a, a); }
template <class T, int N> EMU_FN T length(const vec<T, N>& a) { return sqrt(dot(a, a)); }
template <class T, int N> EMU_FN vec<T, N> normalize(const vec<T, N>& a) { return a * rsqrt(dot(a, a)); }

// ---- integers ----

#define EMU_INTEGER template <class T, emu_if_integer<T> = 0> EMU_FN
#define EMU_BITS(T) (8 * (int)sizeof(T))
template <class T> using emu_unsigned = typename make_unsigned<T>::type;
EMU_INTEGER T popcount(T x) { return (T)__builtin_popcountll((ulong)(emu_unsigned<T>)x); }
EMU_INTEGER T clz(T x) { return x ? (T)(__builtin_clzll((ulong)(emu_unsigned<T>)x) - (64 - EMU_BITS(T))) : (T)EMU_BITS(T); }
EMU_INTEGER T ctz(T x) { return x ? (T)__builtin_ctzll((ulong)x) : (T)EMU_BITS(T); }
EMU_INTEGER T reverse_bits(T x) { return (T)(__builtin_bitreverse64((ulong)(emu_unsigned<T>)x) >> (64 - EMU_BITS(T))); }
EMU_INTEGER T extract_bits(T x, uint offset, uint bits) {
  using U = emu_unsigned<T>;
  return bits == 0 ? (T)0 : (T)((T)(U)((U)x << (EMU_BITS(T) - bits - offset)) >> (EMU_BITS(T) - bits));
}
EMU_INTEGER T insert_bits(T base, T insert, uint offset, uint bits) {
  using U = emu_unsigned<T>;
  U mask = (U)((bits >= EMU_BITS(T) ? (U) ~(U)0 : (U)(((U)1 << bits) - 1)) << offset);
  return (T)(((U)base & ~mask) | (((U)insert << offset) & mask));
}
EMU_INTEGER T rotate(T x, T n) {
  using U = emu_unsigned<T>;
  int k = (int)n & (EMU_BITS(T) - 1);
  return (T)(U)(((U)x << k) | ((U)x >> ((EMU_BITS(T) - k) & (EMU_BITS(T) - 1))));
}
EMU_INTEGER T absdiff(T a, T b) { return a > b ? a - b : b - a; }
EMU_INTEGER T addsat(T a, T b) { T r; if (!__builtin_add_overflow(a, b, &r)) return r; return a < 0 ? numeric_limits<T>::min() : numeric_limits<T>::max(); }
EMU_INTEGER T subsat(T a, T b) { T r; if (!__builtin_sub_overflow(a, b, &r)) return r; return a < b ? numeric_limits<T>::min() : numeric_limits<T>::max(); }
EMU_INTEGER T hadd(T a, T b) { return (T)((a >> 1) + (b >> 1) + (a & b & 1)); }
EMU_INTEGER T mul24(T a, T b) { return (T)(a * b); }
EMU_INTEGER T mad24(T a, T b, T c) { return (T)(a * b + c); }
EMU_FN uint mulhi(uint a, uint b) { return (uint)(((ulong)a * b) >> 32); }
EMU_FN int mulhi(int a, int b) { return (int)(((long)a * b) >> 32); }
EMU_FN ulong mulhi(ulong a, ulong b) { return (ulong)(((unsigned __int128)a * b) >> 64); }
EMU_MAP1(popcount) EMU_MAP1(clz) EMU_MAP1(ctz) EMU_MAP1(reverse_bits)

// ---- fast:: and precise:: ----

#define EMU_DEFINE1_FLOAT(name, expression) \
  EMU_FN float name(float x) { return metal::name(x); } \
  template <int N> EMU_FN vec<float, N> name(const vec<float, N>& v) { return metal::name(v); }
#define EMU_DEFINE2_FLOAT(name, expression) \
  EMU_FN float name(float x, float y) { return metal::name(x, y); } \
  template <int N> EMU_FN vec<float, N> name(const vec<float, N>& a, const vec<float, N>& b) { return metal::name(a, b); }
#define EMU_FLOAT_ONLY \
  EMU_FLOAT1(EMU_DEFINE1_FLOAT) EMU_FLOAT2(EMU_DEFINE2_FLOAT) EMU_DEFINE2_FLOAT(min, ) EMU_DEFINE2_FLOAT(max, ) \
  EMU_FN float clamp(float x, float low, float high) { return metal::clamp(x, low, high); } \
  EMU_FN float fma(float a, float b, float c) { return metal::fma(a, b, c); } \
  EMU_FN float sincos(float x, float& c) { return metal::sincos(x, c); }
namespace fast { EMU_FLOAT_ONLY }
namespace precise { EMU_FLOAT_ONLY }

EMU_FN float2 unpack_half2x16_to_float(uint v) { half2 h = as_type<half2>(v); return float2((float)h.x, (float)h.y); }
EMU_FN half2 unpack_half2x16_to_half(uint v) { return as_type<half2>(v); }
EMU_FN uint pack_float_to_half2x16(float2 v) { return as_type<uint>(half2((half)v.x, (half)v.y)); }
EMU_FN uint pack_half_to_half2x16(half2 v) { return as_type<uint>(v); }
}  // namespace metal
