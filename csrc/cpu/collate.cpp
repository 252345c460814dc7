#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "../collate_checks.h"
#include "convai_fast/collate_kernel.h"

namespace convai_fast {
namespace {

// Below this many output elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 32768;

template <typename Token>
void fill(const CollateArguments& a, const CollateOutput& out) {
  const auto in = collate_input<Token>(a, plan_rows(a.plan));
  const auto widen = widen_for<Token>(current_isa());
  const int64_t batch = a.plan.size(0);
  const int64_t elements = std::max<int64_t>(1, in.num_candidates * in.seq_len);
  std::atomic<int64_t> too_long{-1};
  at::parallel_for(0, batch, std::max<int64_t>(1, kElementsPerTask / elements),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       if (!collate_example(in, out, i, widen)) too_long = i;
                     }
                   });
  TORCH_CHECK_VALUE(too_long < 0, "collate: the prefix of row ", too_long.load(),
                    " does not fit seq_len ", a.seq_len);
}

CollateResult collate_cpu(const at::Tensor& tokens, const at::Tensor& utterance_offsets,
                          const at::Tensor& persona_ids, const at::Tensor& history_ids,
                          const at::Tensor& candidate_ids, const at::Tensor& plan,
                          at::IntArrayRef special_ids, int64_t num_candidates, int64_t seq_len,
                          bool pin_memory) {
  const CollateArguments arguments{tokens,      utterance_offsets, persona_ids,
                                   history_ids, candidate_ids,     plan,
                                   special_ids, num_candidates,    seq_len};
  check_collate(arguments);
  auto result = allocate_collate(arguments, pin_memory && at::hasCUDA());
  if (tokens.scalar_type() == at::kInt) {
    fill<int32_t>(arguments, pointers(result));
  } else {
    fill<uint16_t>(arguments, pointers(result));
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) { m.impl("collate", &collate_cpu); }

}  // namespace convai_fast
