// Vectors at the end of a row, of which only some elements are there.
#include <algorithm>

namespace convai_fast::simd::CONVAI_FAST_ISA {

// The first `count` elements at `source`, and zeros.
template <typename Scalar>
CONVAI_FAST_INLINE Simd::Float load_part(const Scalar* source, int64_t count) {
  if (count >= kWidth) return Simd::load(source);
  Scalar edge[kWidth] = {};
  std::copy_n(source, count, edge);
  return Simd::load(edge);
}

template <typename Scalar>
CONVAI_FAST_INLINE void store_part(Scalar* target, Simd::Float x, int64_t count) {
  if (count >= kWidth) return Simd::store(target, x);
  Scalar edge[kWidth];
  Simd::store(edge, x);
  std::copy_n(edge, count, target);
}

}  // namespace convai_fast::simd::CONVAI_FAST_ISA
