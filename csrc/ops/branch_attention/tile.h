// The inner loop of attention's products: some rows of x by some panels of 16 columns, summed
// in registers. A sum is taken in the order of k, whatever the number of rows and panels, so that a
// row's result does not depend on what is computed beside it.
#include <type_traits>

namespace convai_fast::branch_attention::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;
using simd::BFloat16;
using simd::Format;

// What numbers in the format Scalar are multiplied in: float32, or bfloat16 where the processor
// does so. Of the latter two lie together in a word of 32 bits; k counts words.
template <typename Scalar>
using OperandOf =
    std::conditional_t<CONVAI_FAST_BF16 && std::is_same_v<Scalar, BFloat16>, BFloat16, float>;

template <typename Operand, int kRows, int kPanels>
struct Tile {
  static constexpr int kVectors = kPanel / kWidth;     // of a panel
  static constexpr int kColumns = kPanels * kVectors;  // of the tile, in vectors
  static constexpr int64_t kTogether = Format<Operand>::kTogether;
  Simd::Float sums[kRows][kColumns];

  CONVAI_FAST_INLINE void clear() {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 16
      for (int v = 0; v < kColumns; ++v) sums[i][v] = Simd::Float{};
    }
  }

  CONVAI_FAST_INLINE void load_row(int i, const float* source) {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) sums[i][v] = Simd::load(source + v * kWidth);
  }

  CONVAI_FAST_INLINE void store_row(int i, float* target, float factor) const {
#pragma GCC unroll 16
    for (int v = 0; v < kColumns; ++v) Simd::store(target + v * kWidth, sums[i][v] * factor);
  }

  // sums[i][n] += x[i][k] * weight[k][n] for k < depth. Row i of x begins at word i * x_stride
  // and goes on by x_step; the 16 words of weight k are at k * stride, those of the next panel
  // panel_stride further on.
  CONVAI_FAST_INLINE void add_products(const Operand* x, int64_t x_stride, int64_t x_step,
                                       const Operand* weight, int64_t stride, int64_t panel_stride,
                                       int64_t depth) {
    const auto* words = reinterpret_cast<const int32_t*>(weight);
    for (int64_t k = 0; k < depth; ++k) {
      Simd::Int w[kColumns];
#pragma GCC unroll 16
      for (int v = 0; v < kColumns; ++v) {
        w[v] = Simd::load(words + v / kVectors * panel_stride + k * stride + v % kVectors * kWidth);
      }
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        typename Words<Operand>::Wide factor;
        std::memcpy(&factor, x + (i * x_stride + k * x_step) * kTogether, sizeof(factor));
#pragma GCC unroll 16
        for (int v = 0; v < kColumns; ++v) Words<Operand>::add(sums[i][v], factor, w[v]);
      }
    }
  }
};

}  // namespace convai_fast::branch_attention::CONVAI_FAST_ISA
