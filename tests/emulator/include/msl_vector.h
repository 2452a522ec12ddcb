// vec<T, 2..4>, swizzles, packed vectors, array, as_type. The named components are the active member of a union (so that
// constexpr works); an array lies over them for indexing, and each swizzle is a member that lies over the whole vector.
#pragma once
namespace metal {
template <class T, int N> struct vec;
template <class T> struct emu_is_vec : false_type {};
template <class T, int N> struct emu_is_vec<vec<T, N>> : true_type {};
template <class T> inline constexpr bool is_vector_v = emu_is_vec<remove_cv_t<T>>::value;
template <class T> inline constexpr bool is_scalar_v = is_arithmetic_v<T>;

// ---- swizzles ----

template <class T, int N, int... I> struct emu_swizzle {
  using vector = vec<T, int(sizeof...(I))>;
  T d[N == 3 ? 4 : N];
  static constexpr int idx[sizeof...(I)] = {I...};
  EMU_FN constexpr operator vector() const { return vector(d[I]...); }
  EMU_FN constexpr T operator[](int i) const { return d[idx[i]]; }
  // A member of a union must stay trivially copyable, and its own operator= would copy all of d: the front end therefore
  // rewrites `a.xy = e` to `a.xy.emu_set() = e`.
  struct setter {
    emu_swizzle& swizzle;
    EMU_FN constexpr const setter& operator=(vector v) const {
      int k = 0;
      ((swizzle.d[I] = v[k++]), ...);
      return *this;
    }
  };
  EMU_FN constexpr setter emu_set() { return setter{*this}; }
#define EMU_ASSIGN(op)                              \
  EMU_FN constexpr emu_swizzle& operator op(vector v) { \
    int k = 0;                                      \
    ((d[I] op v[k++]), ...);                        \
    return *this;                                   \
  }
  EMU_ASSIGN(+=) EMU_ASSIGN(-=) EMU_ASSIGN(*=) EMU_ASSIGN(/=)
#undef EMU_ASSIGN
};
template <class T> struct emu_is_swizzle : false_type {};
template <class T, int N, int... I> struct emu_is_swizzle<emu_swizzle<T, N, I...>> : true_type {};

// How many components an argument of a vector's constructor has.
template <class A> struct emu_components { static constexpr int n = 1; };
template <class T, int N> struct emu_components<vec<T, N>> { static constexpr int n = N; };
template <class T, int N, int... I> struct emu_components<emu_swizzle<T, N, I...>> { static constexpr int n = sizeof...(I); };
template <class A> EMU_FN constexpr auto emu_component(const A& a, int i) {
  if constexpr (emu_components<A>::n == 1) {
    (void)i;
    return a;
  } else {
    return a[i];
  }
}

// ---- vec ----

#define EMU_VECTOR(NN, NAMED, AT)                                                                                         \
  struct emu_list { T t[NN]; };                                                                                           \
  vec() = default;                                                                                                        \
  EMU_FN explicit constexpr vec(const emu_list& l) : NAMED {}                                                             \
  template <class S> EMU_FN static constexpr emu_list emu_splat(S s) {                                                    \
    emu_list l{};                                                                                                         \
    for (int i = 0; i < NN; i++) l.t[i] = (T)s;                                                                           \
    return l;                                                                                                             \
  }                                                                                                                       \
  template <class V> EMU_FN static constexpr emu_list emu_convert(const V& v) {                                           \
    emu_list l{};                                                                                                         \
    for (int i = 0; i < NN; i++) l.t[i] = (T)v[i];                                                                        \
    return l;                                                                                                             \
  }                                                                                                                       \
  template <class A> EMU_FN static constexpr void emu_put(emu_list& l, int& k, const A& a) {                              \
    for (int i = 0; i < emu_components<A>::n; i++) l.t[k++] = (T)emu_component(a, i);                                     \
  }                                                                                                                       \
  template <class... R> EMU_FN static constexpr emu_list emu_join(const R&... r) {                                        \
    emu_list l{};                                                                                                         \
    int k = 0;                                                                                                            \
    (emu_put(l, k, r), ...);                                                                                              \
    return l;                                                                                                             \
  }                                                                                                                       \
  template <class S, enable_if_t<is_arithmetic_v<S> || is_enum_v<S>, int> = 0>                                            \
  EMU_FN constexpr vec(S s) : vec(emu_splat(s)) {}                                                                        \
  template <class U, enable_if_t<!is_same_v<U, T>, int> = 0>                                                              \
  EMU_FN explicit constexpr vec(const vec<U, NN>& o) : vec(emu_convert(o)) {}                                             \
  template <class U, int M, int... I, enable_if_t<sizeof...(I) == NN && !is_same_v<U, T>, int> = 0>                       \
  EMU_FN explicit constexpr vec(const emu_swizzle<U, M, I...>& o) : vec(emu_convert(o)) {}                                \
  template <class A, class B, class... R,                                                                                 \
            enable_if_t<emu_components<A>::n + emu_components<B>::n + (0 + ... + emu_components<R>::n) == NN, int> = 0>   \
  EMU_FN constexpr vec(const A& a, const B& b, const R&... r) : vec(emu_join(a, b, r...)) {}                              \
  EMU_FN constexpr T& operator[](int i) { if (__builtin_is_constant_evaluated()) return AT; else return emu_a[i]; }       \
  EMU_FN constexpr const T& operator[](int i) const { if (__builtin_is_constant_evaluated()) return AT; else return emu_a[i]; }

// When checked, a copy binds a reference, which is where the compiler looks at an address's alignment.
#ifdef EMU_CHECKED
#define EMU_COPY(COPY, ASSIGN)                                                  \
  EMU_FN constexpr vec(const vec& o) : COPY {}                                  \
  EMU_FN constexpr vec& operator=(const vec& o) { ASSIGN; return *this; }
#else
#define EMU_COPY(COPY, ASSIGN)
#endif

#define EMU_2(N, a, b, name) emu_swizzle<T, N, a, b> name;
#define EMU_3(N, a, b, c, name) emu_swizzle<T, N, a, b, c> name;
#define EMU_4(a, b, c, d, name) emu_swizzle<T, 4, a, b, c, d> name;

template <class T> struct alignas(2 * sizeof(T)) vec<T, 2> {
  union {
    struct { T x, y; };
    struct { T r, g; };
    T emu_a[2];
    EMU_2(2, 0, 0, xx) EMU_2(2, 0, 1, xy) EMU_2(2, 1, 0, yx) EMU_2(2, 1, 1, yy)
  };
#define EMU_NAMED x(l.t[0]), y(l.t[1])
  EMU_VECTOR(2, EMU_NAMED, i == 0 ? x : y)
#undef EMU_NAMED
#define EMU_NAMED x(o.x), y(o.y)
  EMU_COPY(EMU_NAMED, (x = o.x, y = o.y))
#undef EMU_NAMED
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 3> {
  union {
    struct { T x, y, z; };
    struct { T r, g, b; };
    T emu_a[3];
    EMU_2(3, 0, 0, xx) EMU_2(3, 0, 1, xy) EMU_2(3, 0, 2, xz) EMU_2(3, 1, 0, yx) EMU_2(3, 1, 1, yy) EMU_2(3, 1, 2, yz)
    EMU_2(3, 2, 0, zx) EMU_2(3, 2, 1, zy) EMU_2(3, 2, 2, zz)
    EMU_3(3, 0, 1, 2, xyz) EMU_3(3, 2, 1, 0, zyx) EMU_3(3, 0, 0, 0, xxx) EMU_3(3, 1, 1, 1, yyy) EMU_3(3, 2, 2, 2, zzz)
  };
#define EMU_NAMED x(l.t[0]), y(l.t[1]), z(l.t[2])
  EMU_VECTOR(3, EMU_NAMED, i == 0 ? x : i == 1 ? y : z)
#undef EMU_NAMED
#define EMU_NAMED x(o.x), y(o.y), z(o.z)
  EMU_COPY(EMU_NAMED, (x = o.x, y = o.y, z = o.z))
#undef EMU_NAMED
};
template <class T> struct alignas(4 * sizeof(T)) vec<T, 4> {
  union {
    struct { T x, y, z, w; };
    struct { T r, g, b, a; };
    T emu_a[4];
    EMU_2(4, 0, 0, xx) EMU_2(4, 0, 1, xy) EMU_2(4, 0, 2, xz) EMU_2(4, 0, 3, xw) EMU_2(4, 1, 0, yx) EMU_2(4, 1, 1, yy)
    EMU_2(4, 1, 2, yz) EMU_2(4, 1, 3, yw) EMU_2(4, 2, 0, zx) EMU_2(4, 2, 1, zy) EMU_2(4, 2, 2, zz) EMU_2(4, 2, 3, zw)
    EMU_2(4, 3, 0, wx) EMU_2(4, 3, 1, wy) EMU_2(4, 3, 2, wz) EMU_2(4, 3, 3, ww)
    EMU_3(4, 0, 1, 2, xyz) EMU_3(4, 1, 2, 3, yzw) EMU_3(4, 2, 1, 0, zyx) EMU_3(4, 0, 1, 3, xyw) EMU_3(4, 0, 2, 3, xzw)
    EMU_4(3, 2, 1, 0, wzyx) EMU_4(0, 0, 0, 0, xxxx) EMU_4(1, 1, 1, 1, yyyy) EMU_4(2, 2, 2, 2, zzzz) EMU_4(3, 3, 3, 3, wwww)
    EMU_4(0, 1, 2, 3, xyzw) EMU_4(1, 0, 3, 2, yxwz) EMU_4(2, 3, 0, 1, zwxy) EMU_4(0, 2, 1, 3, xzyw)
  };
#define EMU_NAMED x(l.t[0]), y(l.t[1]), z(l.t[2]), w(l.t[3])
  EMU_VECTOR(4, EMU_NAMED, i == 0 ? x : i == 1 ? y : i == 2 ? z : w)
#undef EMU_NAMED
#define EMU_NAMED x(o.x), y(o.y), z(o.z), w(o.w)
  EMU_COPY(EMU_NAMED, (x = o.x, y = o.y, z = o.z, w = o.w))
#undef EMU_NAMED
};
#undef EMU_2
#undef EMU_3
#undef EMU_4

// ---- operators: component by component, with a scalar on either side ----

#define EMU_EACH(RESULT, expression)                    \
  {                                                     \
    RESULT r{};                                         \
    for (int i = 0; i < N; i++) r[i] = expression;      \
    return r;                                           \
  }
#define EMU_SCALAR class S, enable_if_t<is_arithmetic_v<S>, int> = 0
#define EMU_BINARY(op, R)                                                                                                    \
  template <class T, int N> EMU_FN constexpr vec<R, N> operator op(const vec<T, N>& a, const vec<T, N>& b) EMU_EACH(         \
      EMU_TYPE(vec<R, N>), (R)(a[i] op b[i]))                                                                                \
  template <class T, int N, EMU_SCALAR> EMU_FN constexpr vec<R, N> operator op(const vec<T, N>& a, S s) EMU_EACH(            \
      EMU_TYPE(vec<R, N>), (R)(a[i] op(T) s))                                                                                \
  template <class T, int N, EMU_SCALAR> EMU_FN constexpr vec<R, N> operator op(S s, const vec<T, N>& a) EMU_EACH(            \
      EMU_TYPE(vec<R, N>), (R)((T)s op a[i]))                                                                                \
  template <class T, int N, int... I, class B>                                                                               \
  EMU_FN constexpr auto operator op(const emu_swizzle<T, N, I...>& a, const B& b) {                                          \
    return vec<T, int(sizeof...(I))>(a) op b;                                                                                \
  }                                                                                                                          \
  template <class T, int N, int... I, class A, enable_if_t<!emu_is_swizzle<A>::value, int> = 0>                              \
  EMU_FN constexpr auto operator op(const A& a, const emu_swizzle<T, N, I...>& b) {                                          \
    return a op vec<T, int(sizeof...(I))>(b);                                                                                \
  }
#define EMU_TYPE(...) __VA_ARGS__
#define EMU_ARITHMETIC(op)                                                                                                   \
  EMU_BINARY(op, T)                                                                                                          \
  template <class T, int N> EMU_FN constexpr vec<T, N>& operator op##=(vec<T, N>& a, const vec<T, N>& b) {                   \
    for (int i = 0; i < N; i++) a[i] = (T)(a[i] op b[i]);                                                                    \
    return a;                                                                                                                \
  }                                                                                                                          \
  template <class T, int N, EMU_SCALAR> EMU_FN constexpr vec<T, N>& operator op##=(vec<T, N>& a, S s) {                      \
    for (int i = 0; i < N; i++) a[i] = (T)(a[i] op(T) s);                                                                    \
    return a;                                                                                                                \
  }                                                                                                                          \
  template <class T, int N, int M, int... I>                                                                                 \
  EMU_FN constexpr vec<T, N>& operator op##=(vec<T, N>& a, const emu_swizzle<T, M, I...>& b) {                               \
    return a op##= vec<T, N>(b);                                                                                             \
  }
EMU_ARITHMETIC(+) EMU_ARITHMETIC(-) EMU_ARITHMETIC(*) EMU_ARITHMETIC(/) EMU_ARITHMETIC(%)
EMU_ARITHMETIC(&) EMU_ARITHMETIC(|) EMU_ARITHMETIC(^) EMU_ARITHMETIC(<<) EMU_ARITHMETIC(>>)
EMU_BINARY(==, bool) EMU_BINARY(!=, bool) EMU_BINARY(<, bool) EMU_BINARY(>, bool) EMU_BINARY(<=, bool) EMU_BINARY(>=, bool)
EMU_BINARY(&&, bool) EMU_BINARY(||, bool)
#define EMU_UNARY(op, R) \
  template <class T, int N> EMU_FN constexpr vec<R, N> operator op(const vec<T, N>& a) EMU_EACH(EMU_TYPE(vec<R, N>), (R)(op a[i]))
EMU_UNARY(-, T) EMU_UNARY(+, T) EMU_UNARY(~, T) EMU_UNARY(!, bool)

// ---- packed vectors and arrays ----

template <class T, int N> struct packed_vec {
  T d[N];
  packed_vec() = default;
  EMU_FN constexpr packed_vec(vec<T, N> v) : d{} {
    for (int i = 0; i < N; i++) d[i] = v[i];
  }
  EMU_FN constexpr operator vec<T, N>() const EMU_EACH(EMU_TYPE(vec<T, N>), d[i])
  EMU_FN constexpr T& operator[](int i) { return d[i]; }
  EMU_FN constexpr T operator[](int i) const { return d[i]; }
};
template <class T, size_t N> struct array {
  T __elems[N];
  EMU_FN constexpr T& operator[](size_t i) { return __elems[i]; }
  EMU_FN constexpr const T& operator[](size_t i) const { return __elems[i]; }
  EMU_FN static constexpr size_t size() { return N; }
};
}  // namespace metal

#define EMU_VECTORS(T)                                                                                            \
  using T##2 = metal::vec<T, 2>;                                                                                  \
  using T##3 = metal::vec<T, 3>;                                                                                  \
  using T##4 = metal::vec<T, 4>;                                                                                  \
  using packed_##T##2 = metal::packed_vec<T, 2>;                                                                  \
  using packed_##T##3 = metal::packed_vec<T, 3>;                                                                  \
  using packed_##T##4 = metal::packed_vec<T, 4>;                                                                  \
  namespace metal {                                                                                               \
  using ::T##2; using ::T##3; using ::T##4; using ::packed_##T##2; using ::packed_##T##3; using ::packed_##T##4;  \
  }
EMU_VECTORS(bool) EMU_VECTORS(char) EMU_VECTORS(uchar) EMU_VECTORS(short) EMU_VECTORS(ushort) EMU_VECTORS(int) EMU_VECTORS(uint)
EMU_VECTORS(long) EMU_VECTORS(ulong) EMU_VECTORS(half) EMU_VECTORS(float) EMU_VECTORS(bfloat)

template <class To, class From> EMU_FN constexpr To as_type(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as_type<>: the sizes differ");
  if constexpr (__is_trivially_copyable(To) && __is_trivially_copyable(From)) {
    return __builtin_bit_cast(To, from);
  } else {
    To to;
    __builtin_memcpy((void*)&to, (const void*)&from, sizeof to);
    return to;
  }
}
namespace metal { using ::as_type; }
