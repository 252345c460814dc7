// The softmax of a row, but for the division.

namespace convai_fast::simd::CONVAI_FAST_ISA {

struct Softmax {
  float largest, sum;
};

// Turns x[0 .. count) into e^(x - largest), of which `sum` is the sum. There is at least one that
// is not -inf, and count is a multiple of kWidth.
CONVAI_FAST_INLINE Softmax exponentiate(float* x, int64_t count) {
  auto maxima = Simd::load(x);
  for (int64_t j = kWidth; j < count; j += kWidth) maxima = Simd::max(maxima, Simd::load(x + j));
  const float largest = Simd::max(maxima);
  Simd::Float sums{};
  for (int64_t j = 0; j < count; j += kWidth) {
    const auto weight = Simd::exp(Simd::load(x + j) - largest);
    Simd::store(x + j, weight);
    sums += weight;
  }
  return {largest, Simd::sum(sums)};
}

}  // namespace convai_fast::simd::CONVAI_FAST_ISA
