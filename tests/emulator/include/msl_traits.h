// <metal_type_traits> and <metal_limits>: included inside of namespace metal, by msl.h and by lint.h.
template <class T, T v> struct integral_constant {
  static constexpr constant T value = v; using value_type = T; using type = integral_constant;
  constexpr operator T() const { return v; } constexpr T operator()() const { return v; }
};
template <bool B> using bool_constant = integral_constant<bool, B>;
using true_type = bool_constant<true>; using false_type = bool_constant<false>;
template <bool B, class T = void> struct enable_if {};
template <class T> struct enable_if<true, T> { using type = T; };
template <bool B, class T = void> using enable_if_t = typename enable_if<B, T>::type;
template <bool B, class T, class F> struct conditional { using type = T; };
template <class T, class F> struct conditional<false, T, F> { using type = F; };
template <bool B, class T, class F> using conditional_t = typename conditional<B, T, F>::type;
template <class T> struct remove_const { using type = T; };
template <class T> struct remove_const<const T> { using type = T; };
template <class T> struct remove_volatile { using type = T; };
template <class T> struct remove_volatile<volatile T> { using type = T; };
template <class T> struct remove_cv { using type = typename remove_const<typename remove_volatile<T>::type>::type; };
template <class T> struct remove_reference { using type = T; };
template <class T> struct remove_reference<T&> { using type = T; };
template <class T> struct remove_reference<T&&> { using type = T; };
template <class T> struct remove_pointer { using type = T; };
template <class T> struct remove_pointer<T*> { using type = T; };
template <class T> using remove_const_t = typename remove_const<T>::type;
template <class T> using remove_cv_t = typename remove_cv<T>::type;
template <class T> using remove_reference_t = typename remove_reference<T>::type;
template <class T> using remove_pointer_t = typename remove_pointer<T>::type;
template <class T> struct remove_addrspace { using type = T; };
template <class T> using remove_addrspace_t = T;
template <class T> using decay_t = remove_cv_t<remove_reference_t<T>>;
template <class A, class B> struct is_same : bool_constant<__is_same(A, B)> {};
template <class A, class B> inline constexpr constant bool is_same_v = __is_same(A, B);
template <class T> struct is_const : false_type {};
template <class T> struct is_const<const T> : true_type {};
template <class T> inline constexpr constant bool is_const_v = is_const<T>::value;
template <class T> inline constexpr constant bool emu_is_fp = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <class T> inline constexpr constant bool is_floating_point_v = emu_is_fp<remove_cv_t<T>>;
template <class T> inline constexpr constant bool is_integral_v = __is_integral(T);
template <class T> inline constexpr constant bool is_arithmetic_v = is_floating_point_v<T> || is_integral_v<T>;
template <class T> inline constexpr constant bool is_signed_v = is_floating_point_v<T> || (is_integral_v<T> && T(-1) < T(0));
template <class T> inline constexpr constant bool is_unsigned_v = is_integral_v<T> && !(T(-1) < T(0));
template <class T> inline constexpr constant bool is_pointer_v = __is_pointer(T);
template <class T> inline constexpr constant bool is_reference_v = __is_reference(T);
template <class T> inline constexpr constant bool is_enum_v = __is_enum(T);
template <class T> inline constexpr constant bool is_class_v = __is_class(T);
template <class T> inline constexpr constant bool is_void_v = __is_same(remove_cv_t<T>, void);
template <class A, class B> inline constexpr constant bool is_convertible_v = __is_convertible(A, B);
template <class A, class B> inline constexpr constant bool is_base_of_v = __is_base_of(A, B);
template <class T> inline constexpr constant bool is_trivially_copyable_v = __is_trivially_copyable(T);
template <class T> inline constexpr constant bool is_empty_v = __is_empty(T);
template <class A, class... B> inline constexpr constant bool is_constructible_v = __is_constructible(A, B...);
#define EMU_TRAIT(n) template <class T> struct n : bool_constant<n##_v<T>> {};
EMU_TRAIT(is_floating_point) EMU_TRAIT(is_integral) EMU_TRAIT(is_arithmetic) EMU_TRAIT(is_signed) EMU_TRAIT(is_unsigned)
EMU_TRAIT(is_pointer) EMU_TRAIT(is_reference) EMU_TRAIT(is_enum) EMU_TRAIT(is_class) EMU_TRAIT(is_void) EMU_TRAIT(is_trivially_copyable)
template <class A, class B> struct is_convertible : bool_constant<is_convertible_v<A, B>> {};
template <class... B> struct _disjunction : false_type {};
template <class A, class... B> struct _disjunction<A, B...> : bool_constant<bool(A::value) || _disjunction<B...>::value> {};
template <class... B> struct _conjunction : true_type {};
template <class A, class... B> struct _conjunction<A, B...> : bool_constant<bool(A::value) && _conjunction<B...>::value> {};
template <class A> struct _negation : bool_constant<!A::value> {};
template <class T> T&& declval() noexcept;
template <class T> struct make_unsigned { using type = T; };
template <> struct make_unsigned<char> { using type = uchar; }; template <> struct make_unsigned<short> { using type = ushort; };
template <> struct make_unsigned<int> { using type = uint; };   template <> struct make_unsigned<long> { using type = ulong; };
template <class T> using make_unsigned_t = typename make_unsigned<T>::type;
template <class... Ts> struct emu_common; template <class T> struct emu_common<T> { using type = T; };
template <class A, class B> struct emu_common<A, B> { using type = decltype(true ? declval<A>() : declval<B>()); };
template <class... Ts> using common_type_t = decay_t<typename emu_common<Ts...>::type>;
template <size_t... I> struct index_sequence {};
template <class T, T... I> struct emu_iseq { using type = index_sequence<size_t(I)...>; };
template <size_t N> using make_index_sequence = typename __make_integer_seq<emu_iseq, size_t, N>::type;

// ---- <metal_limits> ----
template <class T> struct numeric_limits;
#define EMU_ILIM(T, lo, hi) template <> struct numeric_limits<T> { static constexpr constant bool is_specialized = true; \
  static constexpr constant bool is_integer = true; static constexpr constant bool is_signed = lo != 0; static constexpr constant int digits = sizeof(T) * 8 - (lo != 0); \
  static constexpr T min() { return lo; } static constexpr T max() { return hi; } static constexpr T lowest() { return lo; } \
  static constexpr T infinity() { return 0; } static constexpr T quiet_NaN() { return 0; } static constexpr T epsilon() { return 0; } };
EMU_ILIM(bool, false, true) EMU_ILIM(char, -128, 127) EMU_ILIM(signed char, -128, 127) EMU_ILIM(uchar, 0, 255)
EMU_ILIM(short, -32768, 32767) EMU_ILIM(ushort, 0, 65535) EMU_ILIM(int, INT_MIN, INT_MAX) EMU_ILIM(uint, 0, UINT_MAX)
EMU_ILIM(long, (-9223372036854775807L - 1), 9223372036854775807L) EMU_ILIM(ulong, 0, 18446744073709551615UL)
#define EMU_FLIM(T, mn, mx, eps, dig) template <> struct numeric_limits<T> { static constexpr constant bool is_specialized = true; \
  static constexpr constant bool is_integer = false, is_signed = true, has_infinity = true; static constexpr constant int digits = dig; \
  static constexpr T min() { return (T)mn; } static constexpr T max() { return (T)mx; } static constexpr T lowest() { return (T)-mx; } \
  static constexpr T epsilon() { return (T)eps; } static constexpr T infinity() { return (T)__builtin_inff(); } \
  static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } };
EMU_FLIM(float, __FLT_MIN__, __FLT_MAX__, __FLT_EPSILON__, 24)
EMU_FLIM(half, 6.103515625e-5f, 65504.0f, 9.765625e-4f, 11)
EMU_FLIM(bfloat, 1.17549435e-38f, 3.3895313892515355e38f, 7.8125e-3f, 8)

