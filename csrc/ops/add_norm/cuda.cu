#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/add_norm/check.h"
#include "ops/add_norm/cuda_kernel.cuh"
#include "ops/for_float.h"

namespace convai_fast::add_norm {
namespace {

template <typename Scalar, bool kAligned>
__global__ void __launch_bounds__(kMaxThreads) add_norm_kernel(const Input<Scalar> in) {
  __shared__ BlockScratch scratch;
  add_norm_block<Scalar, kAligned>(in, scratch);
}

template <typename Scalar>
void launch(const Input<Scalar>& in, int64_t rows) {
  const auto kernel =
      is_aligned(in) ? add_norm_kernel<Scalar, true> : add_norm_kernel<Scalar, false>;
  kernel<<<rows, threads_for(in.n_embd), 0, c10::cuda::getCurrentCUDAStream()>>>(in);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

std::tuple<at::Tensor, at::Tensor> add_norm_cuda(const at::Tensor& x, const at::Tensor& residual,
                                                 const at::Tensor& weight,
                                                 const std::optional<at::Tensor>& bias, double eps,
                                                 bool rms_norm) {
  check_arguments(x, residual, weight, bias);
  const int64_t n_embd = weight.size(0);
  TORCH_CHECK_VALUE(n_embd <= kMaxFeatures, "add_norm: x may have ", kMaxFeatures,
                    " features on CUDA, not ", n_embd);
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor sum = at::empty_like(x, at::MemoryFormat::Contiguous);
  const at::Tensor normed = at::empty_like(sum);
  if (x.numel() == 0) return {sum, normed};
  const at::Tensor xs = x.contiguous(), residuals = residual.contiguous();
  const at::Tensor weights = weight.contiguous();
  const at::Tensor biases = bias ? bias->contiguous() : at::Tensor();
  for_float(x, [&]<typename Scalar>(Scalar) {
    launch(Input<Scalar>{.x = xs.const_data_ptr<Scalar>(),
                         .residual = residuals.const_data_ptr<Scalar>(),
                         .weight = weights.const_data_ptr<Scalar>(),
                         .bias = bias ? biases.const_data_ptr<Scalar>() : nullptr,
                         .sum = sum.mutable_data_ptr<Scalar>(),
                         .normed = normed.mutable_data_ptr<Scalar>(),
                         .n_embd = static_cast<int>(n_embd),
                         .eps = static_cast<float>(eps),
                         .rms_norm = rms_norm},
           x.numel() / n_embd);
  });
  return {sum, normed};
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) { m.impl("add_norm", &add_norm_cuda); }

}  // namespace convai_fast::add_norm
