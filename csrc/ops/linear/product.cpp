#include "ops/linear/product.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "ops/packed_linear/onednn.h"
#include "ops/scratch.h"

#define CONVAI_FAST_KERNEL "ops/linear/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::linear {
namespace {

using packed_linear::onednn_part;
using packed_linear::onednn_release;
using simd::Format;
using simd::kBlock;
using simd::kMostRows;

constexpr int64_t kGroupBytes = 512 << 10;  // of packed blocks, beside the rows in the cache
constexpr int64_t kRowsOfSums = 1024;
constexpr int64_t kProductsPerTask = 1 << 20;
constexpr int64_t kValuesPerTask = 1 << 16;

// What a thread keeps for its next product.
template <typename Scalar>
struct Scratch {
  std::vector<Scalar> packed;
  std::vector<float> sums;
};

}  // namespace

template <typename Scalar, typename Value, typename Out>
void multiply(const Scalar* a, int64_t stride, int64_t rows, int64_t features, int64_t part,
              const Matrix<Value>& b, const float* bias, Out* out) {
  part = std::min(part, features);
  const int64_t parts = at::divup(features, part);
  const int64_t block_size = part * kBlock, blocks = at::divup(b.columns, kBlock);
  const int64_t group_bytes = block_size * static_cast<int64_t>(sizeof(Scalar));
  const int64_t most_blocks = std::max<int64_t>(1, kGroupBytes / group_bytes);
  // Where there are fewer blocks than threads, they take some of the rows each; and no more of them
  // than have their sums in the cache from part to part.
  const int64_t for_threads = at::divup(rows, at::divup(at::get_num_threads(), blocks));
  const int64_t most_rows = std::min(for_threads, parts > 1 ? kRowsOfSums : rows);
  const int64_t chunk = simd::round_up(most_rows, kMostRows), chunks = at::divup(rows, chunk);
  const auto pack = CONVAI_FAST_DISPATCH(pack_kernel<Scalar, Value>);
  const auto finish = CONVAI_FAST_DISPATCH(finish_kernel<Out>);
  at::parallel_for(
      0, chunks * blocks, at::divup(kProductsPerTask, chunk * features * kBlock),
      [&](int64_t task, int64_t end) {
        static thread_local Scratch<Scalar> scratch;
        while (task < end) {
          const int64_t first = task / blocks * chunk, last = std::min(rows, first + chunk);
          const int64_t block = task % blocks;
          const int64_t count = std::min(end - task, blocks - block);  // in equal groups
          const int64_t group = at::divup(count, at::divup(count, most_blocks));
          const int64_t width = group * kBlock;
          auto* packed = at_least(scratch.packed, group * block_size);
          auto* sums = at_least(scratch.sums, (parts > 1 ? chunk : kMostRows) * width);
          for (int64_t from = 0; from < features; from += part) {
            const int64_t size = std::min(part, features - from);
            for (int64_t i = 0; i < group; ++i) {
              pack(b, from, size, (block + i) * kBlock, packed + i * block_size);
            }
            for (int64_t row = first; row < last; row += kMostRows) {
              const int64_t num_rows = std::min(kMostRows, last - row);
              float* row_sums = sums + (parts > 1 ? row - first : 0) * width;
              for (int64_t i = 0; i < group; ++i) {
                onednn_part<Scalar>(a + row * stride + from, stride, num_rows,
                                    packed + i * block_size, size, from > 0, row_sums + i * kBlock,
                                    width);
                if (from + size < features) continue;
                const int64_t column = (block + i) * kBlock;
                finish(row_sums + i * kBlock, width, num_rows, bias ? bias + column : nullptr,
                       std::min(kBlock, b.columns - column), out + row * b.columns + column,
                       b.columns);
              }
            }
          }
          task += group;
        }
        onednn_release();
      });
}

template <typename Scalar>
void transpose(const Scalar* x, int64_t rows, int64_t columns, int64_t features, Scalar* to,
               float* sums) {
  const auto kernel = CONVAI_FAST_DISPATCH(transpose_kernel<Scalar>);
  at::parallel_for(0, at::divup(columns, kBlock), at::divup(kValuesPerTask, features * kBlock),
                   [&](int64_t block, int64_t end) {
                     for (; block < end; ++block) {
                       kernel(x, rows, columns, features, block * kBlock, to, sums);
                     }
                   });
}

using simd::BFloat16;
template void multiply(const float*, int64_t, int64_t, int64_t, int64_t, const Matrix<float>&,
                       const float*, float*);
template void multiply(const BFloat16*, int64_t, int64_t, int64_t, int64_t, const Matrix<float>&,
                       const float*, BFloat16*);
template void multiply(const BFloat16*, int64_t, int64_t, int64_t, int64_t, const Matrix<BFloat16>&,
                       const float*, float*);
template void transpose(const float*, int64_t, int64_t, int64_t, float*, float*);
template void transpose(const BFloat16*, int64_t, int64_t, int64_t, BFloat16*, float*);

}  // namespace convai_fast::linear
