// What the front end's rewriting refers to: threadgroup variables, and the functions that call a kernel with a lane's
// arguments and describe them. Parameter types are deduced by the compiler; only attributes are parsed from the text.
#pragma once

// `threadgroup T x[N];` becomes EMU_THREADGROUP(x, T [N]): a place in the threadgroup's memory. The key is a static, so each
// instantiation of a template has a variable of its own, as in Metal.
#define EMU_THREADGROUP(name, ...)                                                                                  \
  static char emu_key_##name;                                                                                       \
  using emu_type_##name = __VA_ARGS__;                                                                              \
  auto& name = *reinterpret_cast<emu_type_##name*>(                                                                 \
      emu_threadgroup_variable(&emu_key_##name, sizeof(emu_type_##name), alignof(emu_type_##name), #name))

namespace emu {
using namespace metal;

template <int KIND, int INDEX> struct Parameter { static constexpr int kind = KIND, index = INDEX; };

template <class T> struct Element { static constexpr int value = EMU_OTHER; };
#define EMU_ELEMENT(T, number) template <> struct Element<T> { static constexpr int value = number; };
EMU_ELEMENT(void, EMU_VOID) EMU_ELEMENT(bool, EMU_BOOL) EMU_ELEMENT(float, EMU_FLOAT) EMU_ELEMENT(half, EMU_HALF) EMU_ELEMENT(bfloat, EMU_BFLOAT)
EMU_ELEMENT(char, EMU_INT8) EMU_ELEMENT(signed char, EMU_INT8) EMU_ELEMENT(uchar, EMU_INT8) EMU_ELEMENT(short, EMU_INT16)
EMU_ELEMENT(ushort, EMU_INT16) EMU_ELEMENT(int, EMU_INT32) EMU_ELEMENT(uint, EMU_INT32) EMU_ELEMENT(long, EMU_INT64) EMU_ELEMENT(ulong, EMU_INT64)
template <class T, int N> struct Element<vec<T, N>> : Element<T> {};
template <class T, int N> struct Element<packed_vec<T, N>> : Element<T> {};
template <class T> struct Element<atomic<T>> : Element<T> {};

template <class P> EMU_FN P builtin(const unsigned* values) {
  if constexpr (is_vector_v<P>) {
    P result{};
    for (int i = 0; i < emu_components<P>::n; i++) result[i] = (typename emu_element<P>::type)values[i];
    return result;
  } else {
    return (P)values[0];
  }
}
template <class Parameter, class P> EMU_FN decltype(auto) argument(const emu_lane* lane) {
  if constexpr (Parameter::kind == EMU_BUFFER) {
    void* memory = lane->group->buffer[Parameter::index];
    if constexpr (is_reference_v<P>)
      return static_cast<P>(*(remove_reference_t<P>*)memory);
    else
      return (P)memory;
  } else {
    return builtin<remove_cv_t<P>>(lane->builtin[Parameter::kind]);
  }
}
template <class... Parameters, class... P> EMU_FN void call(void (*function)(P...), const emu_lane* lane) {
  static_assert(sizeof...(Parameters) == sizeof...(P));
  function(argument<Parameters, P>(lane)...);
}
template <class Parameter, class P> EMU_FN emu_argument describe_one(const char* text) {
  emu_argument a = {Parameter::kind, Parameter::index, is_reference_v<P>, 0, EMU_OTHER, 0, 0, text};
  if constexpr (Parameter::kind == EMU_BUFFER) {
    using To = remove_pointer_t<remove_reference_t<P>>;
    static_assert(is_pointer_v<remove_reference_t<P>> != is_reference_v<P>, "a buffer is a pointer or a reference");
    a.is_const = is_const_v<To>;
    a.element = Element<remove_cv_t<To>>::value;
    if constexpr (!is_void_v<To>) a.size = sizeof(To), a.align = alignof(To);
  }
  return a;
}
template <class... Parameters, class... P>
EMU_FN int describe(void (*)(P...), emu_argument* out, const char* const* texts) {
  int count = 0;
  ((out[count] = describe_one<Parameters, P>(texts[count]), count++), ...);
  return count;
}
}  // namespace emu
