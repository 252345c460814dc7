#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "ops/collate/check.h"
#include "ops/collate/cpu_kernel.h"

namespace convai_fast {
namespace {

// Below this many output elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 32768;

template <typename Token, typename Output>
void fill(const CollateArguments& a, const Output& out, int64_t num_elements) {
  const auto* offsets = a.offsets ? a.offsets->const_data_ptr<int64_t>() : nullptr;
  const auto in = collate_input<Token>(a, plan_rows(a.plan), offsets);
  const auto widen = widen_for<Token>(current_isa());
  const int64_t batch = a.plan.size(0);
  for (int64_t i = 0; i < batch; ++i) {
    TORCH_CHECK_INDEX(is_within_store(in, in.plan[i]), "collate: row ", i,
                      " of the plan points outside the store: an utterance, or history_skip");
  }
  const int64_t elements_per_row = std::max<int64_t>(1, num_elements / std::max<int64_t>(1, batch));
  std::atomic<int64_t> misfit{-1};
  at::parallel_for(0, batch, std::max<int64_t>(1, kElementsPerTask / elements_per_row),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       if (!collate_example(in, out, i, widen)) misfit = i;
                     }
                   });
  TORCH_CHECK_VALUE(misfit < 0, "collate: row ", misfit.load(),
                    " does not fit its place in the output, or max_length ", a.max_length);
}

template <typename Output, typename Result>
void fill_any(const CollateArguments& a, const Result& result) {
  const int64_t num_elements = std::get<0>(result).numel();
  if (a.tokens.scalar_type() == at::kInt) {
    fill<int32_t>(a, pointers<Output>(result), num_elements);
  } else {
    fill<uint16_t>(a, pointers<Output>(result), num_elements);
  }
}

PaddedResult collate_cpu(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                         const at::Tensor& persona_ids, const at::Tensor& history_ids,
                         const at::Tensor& candidate_ids, const at::Tensor& plan,
                         at::IntArrayRef special_ids, int64_t num_candidates, int64_t seq_len,
                         bool pin_memory) {
  const CollateArguments arguments{.tokens = tokens,
                                   .utterance_offsets = utterance_offsets,
                                   .persona_ids = persona_ids,
                                   .history_ids = history_ids,
                                   .candidate_ids = candidate_ids,
                                   .plan = plan,
                                   .special_ids = special_ids,
                                   .num_candidates = num_candidates,
                                   .seq_len = seq_len,
                                   .max_length = seq_len};
  check_collate(arguments);
  auto result = allocate_padded(arguments, pin_memory && at::hasCUDA());
  fill_any<PaddedOutput>(arguments, result);
  return result;
}

SharedResult collate_shared_cpu(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                                const at::Tensor& persona_ids, const at::Tensor& history_ids,
                                const at::Tensor& candidate_ids, const at::Tensor& plan,
                                at::IntArrayRef special_ids, int64_t num_candidates,
                                const at::Tensor& offsets, int64_t num_tokens, int64_t max_length,
                                bool pin_memory) {
  const CollateArguments arguments{.tokens = tokens,
                                   .utterance_offsets = utterance_offsets,
                                   .persona_ids = persona_ids,
                                   .history_ids = history_ids,
                                   .candidate_ids = candidate_ids,
                                   .plan = plan,
                                   .special_ids = special_ids,
                                   .num_candidates = num_candidates,
                                   .offsets = &offsets,
                                   .num_tokens = num_tokens,
                                   .max_length = max_length};
  check_collate(arguments);
  auto result = allocate_shared(arguments, pin_memory && at::hasCUDA());
  fill_any<SharedOutput>(arguments, result);
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("collate", &collate_cpu);
  m.impl("collate_shared", &collate_shared_cpu);
}

}  // namespace convai_fast
