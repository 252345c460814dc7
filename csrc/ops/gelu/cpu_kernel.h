// GELU and its gradient: one read of what goes in, one write, no torch.
#include <algorithm>

namespace convai_fast::gelu::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// The slope is s + s (1 - s) x y', whose last factor may be infinite where s or 1 - s is 0.
constexpr float kFlat = 1e4f;

template <typename Scalar>
CONVAI_FAST_INLINE void gelu_vector(const Scalar* grad, const Scalar* x, Scalar* out) {
  auto v = Simd::load(x);
  if (grad == nullptr) return Simd::store(out, Simd::gelu(v));
  v = v > kFlat ? Simd::broadcast(kFlat) : v < -kFlat ? Simd::broadcast(-kFlat) : v;
  Simd::store(out, Simd::load(grad) * Simd::gelu_slope(v));
}

// out = GELU(x), of `count` elements; with a gradient, that times the slope of GELU at x.
template <typename Scalar>
CONVAI_FAST_TARGET void gelu_kernel(const Scalar* grad, const Scalar* x, int64_t count,
                                    Scalar* out) {
  Scalar edge[kWidth] = {}, grad_edge[kWidth] = {};
  int64_t i = 0;
  for (; i + kWidth <= count; i += kWidth) gelu_vector(grad ? grad + i : nullptr, x + i, out + i);
  std::copy_n(x + i, count - i, edge);
  if (grad) std::copy_n(grad + i, count - i, grad_edge);
  gelu_vector(grad ? grad_edge : nullptr, edge, edge);
  std::copy_n(edge, count - i, out + i);
}

}  // namespace convai_fast::gelu::CONVAI_FAST_ISA
