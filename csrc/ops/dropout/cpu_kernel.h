// Dropout with masks from Philox: no torch.
#include <algorithm>

#include "ops/dropout/dropout.h"

namespace convai_fast::dropout::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// Elements [begin, end) of x; begin is a multiple of 64. Element n draws word n / 16 % 4 of the
// block with counter n / 64 * 16 + n % 16.
template <typename Scalar>
CONVAI_FAST_TARGET void dropout_kernel(const Dropout& dropout, const Scalar* x, Scalar* out,
                                       int64_t begin, int64_t end) {
  for (int64_t first = begin; first < end; first += 64) {
    const RandomWords random(dropout.seed, first / 4, 0);
    const int64_t valid = std::min<int64_t>(64, end - first);
    Scalar edge[64] = {};
    const Scalar* source = x + first;
    if (valid < 64) source = std::copy_n(source, valid, edge) - valid;
    float kept[64];
#pragma GCC unroll 16
    for (int v = 0; v < 4 * RandomWords::kVectors; ++v) {
      const auto word = random.words[v / RandomWords::kVectors][v % RandomWords::kVectors];
      const auto scaled = Simd::load(source + v * kWidth) * dropout.scale;
      Simd::store(kept + v * kWidth, Simd::where((Simd::Int)(word >= dropout.threshold), scaled));
    }
    for (int64_t n = 0; n < valid; ++n) simd::store(kept[n], out + first + n);
  }
}

}  // namespace convai_fast::dropout::CONVAI_FAST_ISA
