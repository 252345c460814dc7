#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "ops/collate/check.h"
#include "ops/collate/cuda_kernel.cuh"

namespace convai_fast::collate {
namespace {

template <typename Token>
void launch(const Input<Token>& in, const PaddedOutput& out, int64_t batch) {
  const int64_t blocks = batch * in.num_candidates;
  if (blocks == 0) return;
  collate_kernel<Token><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(in, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Token>
void launch(const Input<Token>& in, const SharedOutput& out, int64_t batch) {
  if (batch == 0) return;
  collate_shared_kernel<Token><<<batch, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(in, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

template <typename Output, typename Result>
void launch_any(const Arguments& a, const Result& result) {
  const c10::cuda::CUDAGuard guard(a.tokens.device());
  const auto to_device = [&](const at::Tensor& x) {
    return x.to(a.tokens.device(), at::kLong, /*non_blocking=*/true);
  };
  const at::Tensor plan = to_device(a.plan);
  const at::Tensor offsets = a.offsets ? to_device(*a.offsets) : at::Tensor();
  const int64_t* first = a.offsets ? offsets.const_data_ptr<int64_t>() : nullptr;
  const auto out = pointers<Output>(result);
  if (a.tokens.scalar_type() == at::kInt) {
    launch(input_of<int32_t>(a, rows_of_plan(plan), first), out, plan.size(0));
  } else {
    launch(input_of<uint16_t>(a, rows_of_plan(plan), first), out, plan.size(0));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) {
  m.impl("collate", &collate_padded<launch_any<PaddedOutput, PaddedResult>>);
  m.impl("collate_shared", &collate_shared<launch_any<SharedOutput, SharedResult>>);
}

}  // namespace convai_fast::collate
