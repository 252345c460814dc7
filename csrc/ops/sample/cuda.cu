#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/for_float.h"
#include "ops/sample/check.h"
#include "ops/sample/cuda_kernel.cuh"

namespace convai_fast::sample {
namespace {

template <typename Logit, bool kInShared>
__global__ void __launch_bounds__(kThreads, kInShared ? kBlocksAnSm : 1)
    sample_kernel(const Input<Logit> in, const Output out) {
  __shared__ BlockScratch scratch;
  extern __shared__ uint4 slice[];
  sample_block<Logit, kInShared>(in, out, scratch, reinterpret_cast<Logit*>(slice));
}

template <typename Logit, bool kInShared>
void launch(const Input<Logit>& in, const Output& out, int64_t rows, int num_blocks,
            int64_t slice_bytes) {
  const auto kernel = sample_kernel<Logit, kInShared>;
  C10_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, slice_bytes));
  C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                      cudaSharedmemCarveoutMaxShared));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(num_blocks), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(rows * num_blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = slice_bytes;
  config.stream = c10::cuda::getCurrentCUDAStream();
  config.attrs = &cluster;
  config.numAttrs = num_blocks > 1 ? 1 : 0;
  C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, in, out));
}

// Splits rows over clusters if they would leave SMs idle, or if blocks would not fit an SM twice.
template <typename Logit>
void launch(const Input<Logit>& in, const Output& out, int64_t rows) {
  const int device = c10::cuda::current_device();
  const auto attribute = [&](cudaDeviceAttr name) {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
    return value;
  };
  const int64_t block_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t sm_bytes = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  const int64_t reserved_bytes = attribute(cudaDevAttrReservedSharedMemoryPerBlock);
  cudaFuncAttributes attributes;
  C10_CUDA_CHECK(cudaFuncGetAttributes(&attributes, sample_kernel<Logit, true>));

  constexpr int kMaxBlocks = 8;       // what every device with clusters allows
  constexpr int kLeastTokens = 4096;  // a block; with fewer, waiting for the others costs more
  constexpr int kSmsOfOneGroup = 16;  // a cluster lies in one group of 16 or 18 SMs: count 16
  const int64_t usable_sms =
      attribute(cudaDevAttrMultiProcessorCount) / kSmsOfOneGroup * kSmsOfOneGroup;
  const auto slice_bytes = [&](int num_blocks) {
    return TeamLogits<Logit, true>::slice_bytes(in.vocab_size, num_blocks);
  };
  const auto bytes = [&](int num_blocks) {
    return slice_bytes(num_blocks) + static_cast<int64_t>(attributes.sharedSizeBytes);
  };
  int num_blocks = 1;
  // The code's architecture counts, not the device's: that for sm_80 runs on sm_90, as one block.
  while (attributes.ptxVersion >= 90 && num_blocks < kMaxBlocks) {
    const int next = 2 * num_blocks;
    const bool idle_sms = rows * next <= usable_sms && in.vocab_size >= next * kLeastTokens;
    const bool fit_an_sm = kBlocksAnSm * (bytes(num_blocks) + reserved_bytes) <= sm_bytes;
    if (!idle_sms && fit_an_sm) break;
    num_blocks = next;
  }
  if (bytes(num_blocks) <= block_bytes) {
    launch<Logit, true>(in, out, rows, num_blocks, slice_bytes(num_blocks));
  } else {
    launch<Logit, false>(in, out, rows, num_blocks, 0);
  }
}

template <typename T>
PerRow<T> per_row(const at::Tensor& x) {
  return {.data = x.const_data_ptr<T>(), .stride = stride_of(x)};
}

Result sample_cuda(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_k,
                   const at::Tensor& top_p, const at::Tensor& min_p, const at::Tensor& seeds,
                   const at::Tensor& steps, bool return_logprobs) {
  check_arguments({.logits = logits,
                   .temperature = temperature,
                   .top_k = top_k,
                   .top_p = top_p,
                   .min_p = min_p,
                   .seeds = seeds,
                   .steps = steps});
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  TORCH_CHECK_VALUE(vocab_size < 1 << 24, "sample: the vocabulary must be below 2^24 on CUDA, not ",
                    vocab_size);
  const c10::cuda::CUDAGuard guard(logits.device());
  auto result = allocate(logits, return_logprobs);
  if (rows == 0) return result;
  auto& [token_ids, logprobs] = result;
  const Output out{.token_ids = token_ids.mutable_data_ptr<int64_t>(),
                   .logprobs = return_logprobs ? logprobs.mutable_data_ptr<float>() : nullptr};
  for_float(logits, [&]<typename Logit>(Logit) {
    const Input<Logit> in{.logits = logits.const_data_ptr<Logit>(),
                          .row_stride = logits.stride(0),
                          .column_stride = logits.stride(1),
                          .vocab_size = static_cast<int>(vocab_size),
                          .temperature = per_row<float>(temperature),
                          .top_k = per_row<int64_t>(top_k),
                          .top_p = per_row<float>(top_p),
                          .min_p = per_row<float>(min_p),
                          .seeds = per_row<int64_t>(seeds),
                          .steps = per_row<int64_t>(steps)};
    launch(in, out, rows);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) { m.impl("sample", &sample_cuda); }

}  // namespace convai_fast::sample
