// A row of floats in the format that it is kept or multiplied in: to the nearest, and to even in
// the middle.
#include <algorithm>

namespace convai_fast::simd::CONVAI_FAST_ISA {

CONVAI_FAST_INLINE void round_to(const float* x, int64_t count, float* to) {
  std::copy_n(x, count, to);
}

CONVAI_FAST_INLINE void round_to(const float* x, int64_t count, BFloat16* to) {
  int64_t k = 0;
  for (; k + kWidth <= count; k += kWidth) Simd::store(to + k, Simd::load(x + k));
  for (; k < count; ++k) store(x[k], to + k);
}

CONVAI_FAST_INLINE void round_to(const BFloat16* x, int64_t count, BFloat16* to) {
  std::copy_n(x, count, to);
}

}  // namespace convai_fast::simd::CONVAI_FAST_ISA
