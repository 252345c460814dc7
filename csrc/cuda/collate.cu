#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "../collate_checks.h"
#include "convai_fast/collate.h"

namespace convai_fast {
namespace {

constexpr int kThreads = 128;

// One block a candidate: its threads share out the tokens of each part. Nothing but the plan comes
// from the host, so that a step costs one small copy and one launch.
template <typename Token>
__global__ void __launch_bounds__(kThreads)
    collate_kernel(const CollateInput<Token> in, const CollateOutput out) {
  const int64_t row = blockIdx.x;
  const int64_t i = row / in.num_candidates, j = row % in.num_candidates;
  const PlanRow& plan = in.plan[i];
  int64_t* ids = out.input_ids + row * in.seq_len;
  int64_t* segments = out.token_type_ids + row * in.seq_len;
  int64_t* labels = out.labels + row * in.seq_len;
  const int64_t thread = threadIdx.x;

  int64_t prefix = 0, end = 0;
  const Token* reply = nullptr;
  if (j < plan.candidate_count) {
    const auto write_token = [&](int64_t position, int64_t token, int64_t segment) {
      if (thread == 0) {
        ids[position] = token;
        segments[position] = segment;
      }
    };
    const auto write_utterance = [&](int64_t position, const Token* source, int64_t length,
                                     int64_t segment) {
      for (int64_t k = thread; k < length; k += kThreads) {
        ids[position + k] = source[k];
        segments[position + k] = segment;
      }
    };
    prefix = walk_prefix(in, plan, write_token, write_utterance);
    CUDA_KERNEL_ASSERT(prefix + 2 <= in.seq_len && "collate: a prefix does not fit seq_len");
    const int32_t candidate = in.candidate_ids[plan.candidate_first + j];
    const int64_t begin = in.utterance_offsets[candidate];
    const int64_t length =
        min(in.utterance_offsets[candidate + 1] - begin, in.seq_len - prefix - 2);
    reply = in.tokens + begin;
    end = prefix + 1 + length + 1;
  }

  const bool labelled = j + 1 == plan.candidate_count;  // the true reply is the last one
  for (int64_t k = thread; k < in.seq_len; k += kThreads) {
    if (k >= prefix) {
      const bool inside = k < end;
      ids[k] = !inside        ? in.special.pad
               : k == prefix  ? in.special.speaker1
               : k + 1 == end ? in.special.eos
                              : static_cast<int64_t>(reply[k - prefix - 1]);
      segments[k] = inside ? in.special.speaker1 : in.special.pad;
      labels[k] = labelled && inside && k > prefix ? ids[k] : kIgnoredLabel;
    } else {
      labels[k] = kIgnoredLabel;
    }
  }
  if (thread == 0) out.mc_token_ids[row] = end - 1;
}

template <typename Token>
void launch(const CollateArguments& a, const CollateOutput& out, const at::Tensor& plan) {
  const auto in = collate_input<Token>(a, plan_rows(plan));
  const int64_t blocks = plan.size(0) * a.num_candidates;
  collate_kernel<Token><<<blocks, kThreads, 0, c10::cuda::getCurrentCUDAStream()>>>(in, out);
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

CollateResult collate_cuda(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                           const at::Tensor& persona_ids, const at::Tensor& history_ids,
                           const at::Tensor& candidate_ids, const at::Tensor& plan,
                           at::IntArrayRef special_ids, int64_t num_candidates, int64_t seq_len,
                           bool /*pin_memory*/) {
  const CollateArguments arguments{tokens,      utterance_offsets, persona_ids,
                                   history_ids, candidate_ids,     plan,
                                   special_ids, num_candidates,    seq_len};
  check_collate(arguments);
  const c10::cuda::CUDAGuard guard(tokens.device());
  auto result = allocate_collate(arguments, /*pin_memory=*/false);
  if (plan.size(0) * num_candidates == 0) return result;
  const auto device_plan = plan.to(tokens.device(), at::kLong, /*non_blocking=*/true);
  if (tokens.scalar_type() == at::kInt) {
    launch<int32_t>(arguments, pointers(result), device_plan);
  } else {
    launch<uint16_t>(arguments, pointers(result), device_plan);
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CUDA, m) { m.impl("collate", &collate_cuda); }

}  // namespace convai_fast
