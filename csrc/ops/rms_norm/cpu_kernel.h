// RMSNorm and its gradients: a row is read while it is in the cache, no torch.
#include <cmath>

namespace convai_fast::rms_norm::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

template <typename X, typename Y>
CONVAI_FAST_INLINE float sum_of_products(const X* x, const Y* y, const float* weight,
                                         int64_t size) {
  Simd::Float sum{};
  for (int64_t k = 0; k < size; k += kWidth) {
    const auto product = load_part(x + k, size - k) * load_part(y + k, size - k);
    sum += weight ? product * load_part(weight + k, size - k) : product;
  }
  return Simd::sum(sum);
}

// out = x / rms * weight, with rms = sqrt(mean of x^2 + eps), of rows [rows, size].
template <typename X, typename Out>
CONVAI_FAST_TARGET void rms_norm_kernel(const X* x, const float* weight, float eps, int64_t rows,
                                        int64_t size, Out* out) {
  for (; rows > 0; --rows, x += size, out += size) {
    const float scale = 1 / std::sqrt(sum_of_products(x, x, nullptr, size) / size + eps);
    for (int64_t k = 0; k < size; k += kWidth) {
      const int64_t left = size - k;
      store_part(out + k, load_part(x + k, left) * scale * load_part(weight + k, left), left);
    }
  }
}

// The gradient of x, (w g - x mean(w g x) / rms^2) / rms; adds the weight's, g x / rms, to
// `for_weight` [size].
template <typename X, typename Out>
CONVAI_FAST_TARGET void rms_norm_backward_kernel(const Out* grad, const X* x, const float* weight,
                                                 float eps, int64_t rows, int64_t size, X* for_x,
                                                 float* for_weight) {
  for (; rows > 0; --rows, grad += size, x += size, for_x += size) {
    const float scale = 1 / std::sqrt(sum_of_products(x, x, nullptr, size) / size + eps);
    const float shared = sum_of_products(grad, x, weight, size) / size * scale * scale;
    for (int64_t k = 0; k < size; k += kWidth) {
      const int64_t left = size - k;
      const auto v = load_part(x + k, left), g = load_part(grad + k, left);
      store_part(for_x + k, (g * load_part(weight + k, left) - v * shared) * scale, left);
      store_part(for_weight + k, load_part(for_weight + k, left) + g * v * scale, left);
    }
  }
}

}  // namespace convai_fast::rms_norm::CONVAI_FAST_ISA
