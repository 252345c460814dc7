// SwiGLU and its gradients: one read of what goes in, one write, no torch.

namespace convai_fast::swiglu::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// out = silu(gate) * up, of `count` elements.
template <typename Scalar>
CONVAI_FAST_TARGET void swiglu_kernel(const Scalar* gate, const Scalar* up, int64_t count,
                                      Scalar* out) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t left = count - i;
    store_part(out + i, Simd::silu(load_part(gate + i, left)) * load_part(up + i, left), left);
  }
}

// The gradients of both; with s = 1 / (1 + e^-x), silu is x s and its slope s + x s (1 - s).
template <typename Scalar>
CONVAI_FAST_TARGET void swiglu_backward_kernel(const Scalar* grad, const Scalar* gate,
                                               const Scalar* up, int64_t count, Scalar* for_gate,
                                               Scalar* for_up) {
  for (int64_t i = 0; i < count; i += kWidth) {
    const int64_t left = count - i;
    const auto x = load_part(gate + i, left), g = load_part(grad + i, left);
    const auto small = Simd::exp(x > 0 ? -x : x);
    const auto share = 1.0f / (small + 1.0f), other = small * share;
    const auto s = x > 0 ? share : other;
    store_part(for_gate + i, g * load_part(up + i, left) * (s + x * (share * other)), left);
    store_part(for_up + i, g * (x * s), left);
  }
}

}  // namespace convai_fast::swiglu::CONVAI_FAST_ISA
