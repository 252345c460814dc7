#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <cstdio>

#include "ops/sample/check.h"
#include "ops/sample/row.cuh"
#include "simd/philox.h"

namespace convai_fast {
namespace {

// A tensor with one value a row; stride 0 where all rows share it.
template <typename T>
struct PerRow {
  const T* data;
  int64_t stride;

  explicit PerRow(const at::Tensor& x) : data(x.const_data_ptr<T>()), stride(x.stride(0)) {}
  __device__ T operator[](int64_t row) const { return data[row * stride]; }
};

template <typename Logit>
struct SampleInput {
  const Logit* logits;
  int64_t row_stride, column_stride;
  int vocab_size;
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<float> top_p, min_p;
  PerRow<int64_t> seeds, steps;
};

struct SampleOutput {
  int64_t* token_ids;
  float* logprobs;  // null unless asked for
};

// The tokens that the filters keep: all whose key is smaller, and those of this very key that come
// before token `ties_end`.
struct Edge {
  uint32_t key;
  int ties_end;

  __device__ bool keeps(int i, uint32_t other) const {
    return other < key || (other == key && i < ties_end);
  }
};

template <typename Row>
__device__ Edge find_edge(Row& row, int64_t top_k, float top_p, float min_p) {
  Edge edge{kMasslessKey - 1, row.vocab_size()};
  if (top_k > 0 && top_k < row.vocab_size()) {
    const auto one = [](uint32_t) { return uint64_t{1}; };
    // If fewer than k tokens have mass, all that have are kept.
    const auto k_at_most = [&](uint64_t total) { return min(static_cast<uint64_t>(top_k), total); };
    edge.key = row.select(edge.key + 1, one, k_at_most).key;
  }
  if (top_p > 0 && top_p < 1) {
    // Masses are whole numbers: mass before a token < p * total is mass before it < limit.
    uint64_t limit = 0;
    const auto limit_of = [&](uint64_t total) {
      return limit = __double2ull_ru(static_cast<double>(top_p) * static_cast<double>(total));
    };
    const auto mass_of = [](uint32_t key) { return mass(key); };
    const Selected last = row.select(edge.key + 1, mass_of, limit_of);
    // Of tokens that tie at the edge, so many are kept as it takes to reach the limit.
    const uint64_t each = mass(last.key);
    const uint64_t needed = (limit - last.before + each - 1) / each;
    edge.key = last.key;
    if (needed < last.weight / each) {
      const auto ties = [&](int, uint32_t key) { return uint64_t{key == last.key}; };
      edge.ties_end = row.locate(ties, [&](uint64_t) { return needed - 1; }) + 1;
    }
  }
  if (min_p > 0) {
    // exp(-gap) >= min_p is gap <= -log(min_p); the largest itself is always kept.
    const double largest_gap = 0.0 - log(fmin(static_cast<double>(min_p), 1.0));
    const uint32_t key = __float_as_uint(__double2float_rd(largest_gap));
    if (key < edge.key) edge = {key, row.vocab_size()};
  }
  return edge;
}

// A team of blocks a row; see `SampleRow`.
template <typename Logit, bool kInShared>
__global__ void __launch_bounds__(kSampleThreads, 1)
    sample_kernel(const SampleInput<Logit> in, const SampleOutput out) {
  __shared__ SampleScratch scratch;
  extern __shared__ float slice[];
  const int64_t n = blockIdx.x / Team::size();
  const bool leads = Team::rank() == 0 && threadIdx.x == 0;
  SampleRow<Logit, kInShared> row(in.logits + n * in.row_stride, in.column_stride, in.vocab_size,
                                  scratch, slice);
  const float largest = row.read();
  const float temperature = in.temperature[n];
  // An exception would need the host to wait. An assertion surfaces at its next synchronisation;
  // the line printed before names the row.
  const bool drawable = isfinite(largest), warm = temperature >= 0;
  if (leads) {
    if (!drawable) {
      printf(
          "sample: nothing can be drawn from row %lld of the logits, whose largest value is %f\n",
          static_cast<long long>(n), largest);
    }
    if (!warm) {
      printf("sample: the temperature of row %lld is %f\n", static_cast<long long>(n), temperature);
    }
    CUDA_KERNEL_ASSERT(drawable && "sample: nothing can be drawn from a row of the logits");
    CUDA_KERNEL_ASSERT(warm && "sample: a temperature is negative or NaN");
  }

  // Greedy is: keep the largest only, and draw the first that is kept.
  const bool greedy = temperature == 0;
  const uint64_t unfiltered = row.temper(greedy ? 1 : temperature, out.logprobs != nullptr);
  const Edge edge =
      greedy ? Edge{0, in.vocab_size} : find_edge(row, in.top_k[n], in.top_p[n], in.min_p[n]);
  const uint64_t random = greedy ? 0 : philox(in.seeds[n], in.steps[n]);
  // u = random / 2^32, and u * total rounded down to a whole number, which changes no comparison
  // with one: exact, and below the total, so that a token that is kept is always found.
  const auto u_times = [&](uint64_t total) { return __umul64hi(random << 32, total); };
  const auto kept_mass = [&](int i, uint32_t key) { return edge.keeps(i, key) ? mass(key) : 0; };
  const int token = row.locate(kept_mass, u_times);

  if (leads) {
    out.token_ids[n] = token;
    if (out.logprobs != nullptr) {
      out.logprobs[n] = (row.logit(token) - largest) - log(unfiltered * 0x1p-40);
    }
  }
}

template <typename Logit, bool kInShared>
void launch(const SampleInput<Logit>& in, const SampleOutput& out, int64_t rows, int num_blocks,
            int64_t slice_bytes) {
  const auto kernel = sample_kernel<Logit, kInShared>;
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, slice_bytes));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(num_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(rows * num_blocks);
  config.blockDim = dim3(kSampleThreads);
  config.dynamicSmemBytes = slice_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &cluster;
  config.numAttrs = num_blocks > 1 ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, in, out));
}

// Splits rows over clusters if they would leave SMs idle, or are too long for one block's memory.
template <typename Logit>
void launch(const SampleInput<Logit>& in, const SampleOutput& out, int64_t rows) {
  const int device = c10::cuda::current_device();
  int num_sms = 0, block_bytes = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device));
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&block_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, sample_kernel<Logit, true>));

  constexpr int kMaxBlocks = 8;       // what every device with clusters allows
  constexpr int kLeastTokens = 4096;  // a block; with fewer, waiting for the others costs more
  constexpr int kSmsOfOneGroup = 16;  // a cluster lies in one group of 16 or 18 SMs: count 16
  const int64_t usable_sms = num_sms / kSmsOfOneGroup * kSmsOfOneGroup;
  const auto slice_bytes = [&](int num_blocks) {
    const int64_t span = SampleRow<Logit, true>::span(in.vocab_size, num_blocks);
    return span * kSampleWarps * static_cast<int64_t>(sizeof(float));
  };
  const auto fits = [&](int num_blocks) {
    return slice_bytes(num_blocks) + static_cast<int64_t>(attributes.sharedSizeBytes) <=
           block_bytes;
  };
  int num_blocks = 1;
  // The code's architecture counts, not the device's: that for sm_80 runs on sm_90, as one block.
  while (attributes.ptxVersion >= 90 && num_blocks < kMaxBlocks) {
    const int next = 2 * num_blocks;
    const bool idle_sms = rows * next <= usable_sms && in.vocab_size >= next * kLeastTokens;
    if (!idle_sms && fits(num_blocks)) break;
    num_blocks = next;
  }
  if (fits(num_blocks)) {
    launch<Logit, true>(in, out, rows, num_blocks, slice_bytes(num_blocks));
  } else {
    launch<Logit, false>(in, out, rows, num_blocks, 0);
  }
}

SampleResult sample_cuda(const at::Tensor& logits, const at::Tensor& temperature,
                         const at::Tensor& top_k, const at::Tensor& top_p, const at::Tensor& min_p,
                         const at::Tensor& seeds, const at::Tensor& steps, bool return_logprobs) {
  check_sample({logits, temperature, top_k, top_p, min_p, seeds, steps});
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  TORCH_CHECK_VALUE(vocab_size < 1 << 24, "sample: the vocabulary must be below 2^24 on CUDA, not ",
                    vocab_size);
  const c10::cuda::CUDAGuard guard(logits.device());
  auto result = allocate_sample(logits, return_logprobs);
  if (rows == 0) return result;
  const SampleOutput out{std::get<0>(result).mutable_data_ptr<int64_t>(),
                         return_logprobs ? std::get<1>(result).mutable_data_ptr<float>() : nullptr};
  const auto run = [&](auto* data) {
    using Logit = std::remove_const_t<std::remove_pointer_t<decltype(data)>>;
    const SampleInput<Logit> in{data,
                                logits.stride(0),
                                logits.stride(1),
                                static_cast<int>(vocab_size),
                                PerRow<float>(temperature),
                                PerRow<int64_t>(top_k),
                                PerRow<float>(top_p),
                                PerRow<float>(min_p),
                                PerRow<int64_t>(seeds),
                                PerRow<int64_t>(steps)};
    launch(in, out, rows);
  };
  switch (logits.scalar_type()) {
    case at::kFloat:
      run(logits.const_data_ptr<float>());
      break;
    case at::kBFloat16:
      run(logits.const_data_ptr<at::BFloat16>());
      break;
    default:  // `check_sample` lets no other through
      run(logits.const_data_ptr<at::Half>());
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) { m.impl("sample", &sample_cuda); }

}  // namespace convai_fast
