// Rotary positions for one instruction set: no torch, raw pointers.

namespace convai_fast::rotate::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// Turns heads [heads, 2 * half], the halves of each of which are coordinates of points in a plane;
// `to` may be `x`.
template <typename Scalar>
CONVAI_FAST_TARGET inline void rotate_kernel(const Scalar* x, const float* cosines,
                                             const float* sines, int64_t half, int64_t heads,
                                             Scalar* to) {
  for (; heads > 0; --heads, x += 2 * half, to += 2 * half) {
    for (int64_t k = 0; k < half; k += kWidth) {
      const int64_t left = half - k;
      const auto a = load_part(x + k, left), b = load_part(x + half + k, left);
      const auto cos = load_part(cosines + k, left), sin = load_part(sines + k, left);
      store_part(to + k, a * cos - b * sin, left);
      store_part(to + half + k, b * cos + a * sin, left);
    }
  }
}

}  // namespace convai_fast::rotate::CONVAI_FAST_ISA
