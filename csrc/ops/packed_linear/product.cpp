#include "ops/packed_linear/product.h"

#include <ATen/Parallel.h>

#include <random>
#include <vector>

#include "ops/packed_linear/onednn.h"
#include "ops/scratch.h"

#define CONVAI_FAST_KERNEL "ops/packed_linear/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::packed_linear {
namespace {

// Below this many multiplications a second thread costs more than it saves.
constexpr int64_t kProductsPerTask = 1 << 17;
// Of rounded rows: with a block of the weight they fit into the second-level cache.
constexpr int64_t kChunkBytes = 256 << 10;

// Up to so many rows wait for the weight, which our own loops read from memory faster.
constexpr int64_t kFewRows = 8;

// Whether our own product makes oneDNN's sums, bit for bit and beside any number of rows, so that
// either may be taken for a row. It does in all formats with AVX-512, whose instructions both use;
// AMX adds in another order.
template <typename Scalar>
bool own_product_agrees() {
  static const bool agrees = [] {
    using F = Format<Scalar>;
    constexpr int64_t kFeatures = simd::features_of_part<Scalar>() + 60;
    std::vector<typename F::Activation> x(kMostRows * kFeatures);
    std::vector<Scalar> block(kFeatures * kBlock);
    std::minstd_rand random(1);
    const auto draw = [&](auto& value) {
      if constexpr (std::is_same_v<Scalar, int8_t>) {
        value = static_cast<std::remove_reference_t<decltype(value)>>(random() >> 16);
      } else {
        simd::store(static_cast<float>(random()) / static_cast<float>(1 << 30) - 1, &value);
      }
    };
    for (auto& value : x) draw(value);
    for (auto& weight : block) draw(weight);
    std::vector<typename F::Sum> ours(kMostRows * kBlock), theirs(kMostRows * kBlock);
    const Rows<Scalar> rows{.data = x.data(), .stride = kFeatures};
    const auto own_product = CONVAI_FAST_DISPATCH(own_product_kernel<Scalar>);
    own_product(rows, kMostRows, block.data(), kFeatures, ours.data());
    bool is_same = true;
    for (int64_t count : {int64_t{1}, int64_t{7}, int64_t{9}, int64_t{31}, kMostRows}) {
      onednn_product<Scalar>(rows, count, block.data(), kFeatures, theirs.data());
      is_same &= std::equal(theirs.begin(), theirs.begin() + count * kBlock, ours.begin());
    }
    onednn_release();
    return is_same;
  }();
  return agrees;
}

// A thread's rounded rows, kept for its next product.
template <typename Scalar>
struct RoundedRows {
  std::vector<typename Format<Scalar>::Activation> data;
  std::vector<float> scales;
  std::vector<int32_t> zeros;
  std::vector<float> row;     // a normalized one
  std::vector<float> factor;  // what a block of the gate gives
};

template <typename Scalar>
RoundedRows<Scalar>& rounded_rows_of_this_thread() {
  static thread_local RoundedRows<Scalar> rows;
  return rows;
}

// Rows are taken in chunks that stay in the second-level cache, rounded, while the blocks of the
// weight pass by; every thread takes some blocks of some chunk, and rounds that by itself. A gate's
// block, if there is one, goes before that of the weight.
template <typename Scalar>
void multiply_blocks(const float* x, int64_t stride, int64_t rows, const Norm* norm,
                     const Weight<Scalar>* gate, const Weight<Scalar>& weight,
                     const Results& results) {
  using F = Format<Scalar>;
  const bool is_rounded = norm || !std::is_same_v<Scalar, float>;
  const int64_t padded = weight.padded_features(), blocks = weight.blocks();
  const int64_t row_bytes = std::max<int64_t>(1, padded * sizeof(typename F::Activation));
  const int64_t most_rows = std::max(kMostRows, kChunkBytes / row_bytes);
  const int64_t chunks = (rows + most_rows - 1) / most_rows;
  const int64_t chunk = (rows + chunks - 1) / std::max<int64_t>(1, chunks);
  const bool by_onednn = padded > 0 && onednn_multiplies<Scalar>() &&
                         !(rows <= kFewRows && own_product_agrees<Scalar>());
  const auto round_rows = CONVAI_FAST_DISPATCH(round_rows_kernel<Scalar>);
  const auto own_product = CONVAI_FAST_DISPATCH(own_product_kernel<Scalar>);
  const auto product = by_onednn ? onednn_product<Scalar> : own_product;
  const auto finish = CONVAI_FAST_DISPATCH(finish_kernel<Scalar>);
  const int64_t products = std::max<int64_t>(1, chunk * padded * kBlock * (gate ? 2 : 1));

  const auto multiply_block = [&](const Rows<Scalar>& x_rows, int64_t count, int64_t block,
                                  const Weight<Scalar>& weight, const float* factor,
                                  const Results& results) {
    alignas(64) typename F::Sum sums[kMostRows * kBlock];
    const int64_t parts = (count + kMostRows - 1) / kMostRows;
    const int64_t together = (count + parts - 1) / parts;
    for (int64_t row = 0; row < count; row += together) {
      const int64_t num_rows = std::min(together, count - row);
      product(x_rows.from(row), num_rows, weight.block(block), padded, sums);
      finish(sums, num_rows, weight, x_rows.from(row), block * kBlock,
             factor ? factor + row * kBlock : nullptr, results.from(row, 0));
    }
  };

  at::parallel_for(
      0, chunks * blocks, std::max<int64_t>(1, kProductsPerTask / products),
      [&](int64_t task, int64_t end) {
        auto& rounded = rounded_rows_of_this_thread<Scalar>();
        Rows<Scalar> x_rows{};
        int64_t first = 0, count = 0;
        for (int64_t chunk_at_hand = -1; task < end; ++task) {
          if (task / blocks != chunk_at_hand) {
            chunk_at_hand = task / blocks;
            first = chunk_at_hand * chunk;
            count = std::min(chunk, rows - first);
            if (is_rounded) {
              auto* data = at_least(rounded.data, count * padded);
              float* scales = at_least(rounded.scales, count);
              int32_t* zeros = at_least(rounded.zeros, count);
              float* row = at_least(rounded.row, weight.in_features);
              round_rows(x + first * stride, stride, count, norm, row, weight, data, scales, zeros);
              x_rows = {data, padded, scales, zeros};
            } else if constexpr (std::is_same_v<Scalar, float>) {
              x_rows = {x + first * stride, stride};
            }
          }
          const int64_t block = task % blocks;
          Results to = results.from(first, block * kBlock);
          const float* factor = nullptr;
          if (gate) {
            float* gated = at_least(rounded.factor, count * kBlock);
            multiply_block(x_rows, count, block, *gate, nullptr,
                           {.data = gated, .stride = kBlock, .activation = to.activation});
            factor = gated;
            to.activation = Activation::kNone;
          }
          multiply_block(x_rows, count, block, weight, factor, to);
        }
        if (by_onednn) onednn_release();
      });
}

}  // namespace

template <typename Scalar>
void multiply(const float* x, int64_t stride, int64_t rows, const Norm* norm,
              const Weight<Scalar>& weight, const Results& results) {
  multiply_blocks<Scalar>(x, stride, rows, norm, nullptr, weight, results);
}

template <typename Scalar>
void multiply_gated(const float* x, int64_t stride, int64_t rows, const Norm* norm,
                    const Weight<Scalar>& gate, const Weight<Scalar>& up, const Results& results) {
  multiply_blocks(x, stride, rows, norm, &gate, up, results);
}

void normalize_rows(float* x, int64_t rows, int64_t features, const Norm& norm) {
  CONVAI_FAST_DISPATCH(normalize_rows_kernel)(x, rows, features, norm);
}

void normalize(float* x, int64_t rows, int64_t features, const Norm& norm) {
  constexpr int64_t kValuesPerTask = 1 << 14;
  at::parallel_for(0, rows, std::max<int64_t>(1, kValuesPerTask / std::max<int64_t>(1, features)),
                   [&](int64_t row, int64_t end) {
                     normalize_rows(x + row * features, end - row, features, norm);
                   });
}

#define CONVAI_FAST_MULTIPLY(Scalar)                                                               \
  template void multiply(const float*, int64_t, int64_t, const Norm*, const Weight<Scalar>&,       \
                         const Results&);                                                          \
  template void multiply_gated(const float*, int64_t, int64_t, const Norm*, const Weight<Scalar>&, \
                               const Weight<Scalar>&, const Results&);
CONVAI_FAST_MULTIPLY(float)
CONVAI_FAST_MULTIPLY(simd::BFloat16)
CONVAI_FAST_MULTIPLY(int8_t)
#undef CONVAI_FAST_MULTIPLY

}  // namespace convai_fast::packed_linear
