// <metal_simdgroup_matrix>: 8 x 8 matrices spread over a simdgroup, two elements in each lane. Loads and stores touch only
// the lane's own elements, so the hazards between lanes are those of the GPU. Products are summed in float32.
#pragma once
namespace metal {
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "Metal has 8 x 8 simdgroup matrices only");
  static_assert(is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>, "of half, bfloat or float");
  using storage_type = vec<T, 2>;
  vec<T, 2> emu_own;
  EMU_FN simdgroup_matrix() { emu_own[0] = emu_own[1] = (T)__builtin_nanf(""); }  // until it is loaded or filled
  EMU_FN explicit simdgroup_matrix(T diagonal) {
    int lane = (int)emu_this_lane()->lane, distance = emu_matrix_row(lane) - emu_matrix_column(lane);
    for (int i = 0; i < 2; i++) emu_own[i] = distance == i ? diagonal : (T)0;
  }
  EMU_FN vec<T, 2>& thread_elements() { return emu_own; }
  EMU_FN const vec<T, 2>& thread_elements() const { return emu_own; }
};
template <class T, int R, int C> EMU_FN simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T value) {
  simdgroup_matrix<T, R, C> m;
  m.emu_own = vec<T, 2>(value);
  return m;
}
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;

#define EMU_OFFSET(k) (transpose ? (origin.y + column + k) * stride + origin.x + row : (origin.y + row) * stride + origin.x + column + k)
template <class T>
EMU_FN void simdgroup_load(simdgroup_matrix<T, 8, 8>& m, const T* from, ulong stride = 8, ulong2 origin = ulong2(0ul),
                           bool transpose = false, EMU_SITE) {
  emu_matrix_memory(from, "simdgroup_load", emu_file, emu_line);
  int lane = (int)emu_this_lane()->lane, row = emu_matrix_row(lane), column = emu_matrix_column(lane);
  for (int k = 0; k < 2; k++) m.emu_own[k] = from[EMU_OFFSET(k)];
}
template <class T>
EMU_FN void simdgroup_store(const simdgroup_matrix<T, 8, 8>& m, T* to, ulong stride = 8, ulong2 origin = ulong2(0ul),
                            bool transpose = false, EMU_SITE) {
  emu_matrix_memory(to, "simdgroup_store", emu_file, emu_line);
  int lane = (int)emu_this_lane()->lane, row = emu_matrix_row(lane), column = emu_matrix_column(lane);
  for (int k = 0; k < 2; k++) to[EMU_OFFSET(k)] = m.emu_own[k];
}
template <class D, class A, class B, class C>
EMU_FN void simdgroup_multiply_accumulate(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                                          const simdgroup_matrix<B, 8, 8>& b, const simdgroup_matrix<C, 8, 8>& c, EMU_SITE) {
  emu_product product = {{(float)a.emu_own[0], (float)a.emu_own[1]}, {(float)b.emu_own[0], (float)b.emu_own[1]},
                         {(float)c.emu_own[0], (float)c.emu_own[1]}, {}};
  emu_matrix_product(&product, "simdgroup_multiply_accumulate", emu_file, emu_line);
  for (int k = 0; k < 2; k++) d.emu_own[k] = (D)product.d[k];
}
template <class D, class A, class B>
EMU_FN void simdgroup_multiply(simdgroup_matrix<D, 8, 8>& d, const simdgroup_matrix<A, 8, 8>& a,
                               const simdgroup_matrix<B, 8, 8>& b, EMU_SITE) {
  simdgroup_multiply_accumulate(d, a, b, make_filled_simdgroup_matrix<float, 8, 8>(0.0f), emu_file, emu_line);
}
template <class T>
EMU_FN simdgroup_matrix<T, 8, 8> operator*(const simdgroup_matrix<T, 8, 8>& a, const simdgroup_matrix<T, 8, 8>& b) {
  simdgroup_matrix<T, 8, 8> d;
  simdgroup_multiply(d, a, b);
  return d;
}
}  // namespace metal
