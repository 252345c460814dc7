#include <ATen/Parallel.h>
#include <torch/library.h>

#include <atomic>

#include "ops/collate/check.h"
#include "ops/collate/cpu_kernel.h"

namespace convai_fast::collate {
namespace {

// Below this many output elements a second thread costs more than it saves.
constexpr int64_t kElementsPerTask = 32768;

template <typename Token, typename Output>
void fill(const Arguments& a, const Output& out, int64_t num_elements) {
  const auto* offsets = a.offsets ? a.offsets->const_data_ptr<int64_t>() : nullptr;
  const auto in = input_of<Token>(a, rows_of_plan(a.plan), offsets);
  const int64_t batch = a.plan.size(0);
  const auto* numbers = a.layout.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(std::all_of(numbers + kFirstPiece, numbers + kFirstPlace,
                                [&](int64_t id) { return is_utterance(in, id); }),
                    "collate: layout points outside the store");
  for (int64_t i = 0; i < batch; ++i) {
    TORCH_CHECK_INDEX(is_within_store(in, in.plan[i]), "collate: row ", i,
                      " of the plan points outside the store: an utterance, or history_skip");
  }
  const int64_t elements_per_row = std::max<int64_t>(1, num_elements / std::max<int64_t>(1, batch));
  std::atomic<int64_t> misfit{-1};
  at::parallel_for(0, batch, std::max<int64_t>(1, kElementsPerTask / elements_per_row),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       if (!collate_example(in, out, i)) misfit = i;
                     }
                   });
  TORCH_CHECK_VALUE(misfit < 0, "collate: row ", misfit.load(),
                    " does not fit its place in the output, or max_length ", a.max_length);
}

template <typename Output, typename Result>
void fill_any(const Arguments& a, const Result& result) {
  const int64_t num_elements = std::get<0>(result).numel();
  if (a.tokens.scalar_type() == at::kInt) {
    fill<int32_t>(a, pointers<Output>(result), num_elements);
  } else {
    fill<uint16_t>(a, pointers<Output>(result), num_elements);
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(convai_fast, CPU, m) {
  m.impl("collate", &collate_padded<fill_any<PaddedOutput, PaddedResult>>);
  m.impl("collate_shared", &collate_shared<fill_any<SharedOutput, SharedResult>>);
}

}  // namespace convai_fast::collate
