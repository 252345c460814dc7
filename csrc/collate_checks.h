// What the CPU and the CUDA version of `collate` check and allocate alike.
#pragma once

#include <ATen/ops/empty.h>

#include "check.h"
#include "convai_fast/collate.h"

namespace convai_fast {

using CollateResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

struct CollateArguments {
  const at::Tensor &tokens, &utterance_offsets, &persona_ids, &history_ids, &plan, &candidates;
  at::IntArrayRef special_ids;
  int64_t seq_len;
};

// The plan is checked on the host: it is small, and its rows are where a caller's mistake would
// read outside the store. The store's own arrays are checked when it is opened.
inline void check_collate(const CollateArguments& a) {
  const auto dtype = a.tokens.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kUInt16 || dtype == at::kInt,
                   "collate: tokens must be uint16 or int32, not ", dtype);
  check_tensor(a.tokens, "collate: tokens", dtype, 1);
  check_tensor(a.utterance_offsets, "collate: utterance_offsets", at::kLong, 1);
  check_tensor(a.persona_ids, "collate: persona_ids", at::kInt, 1);
  check_tensor(a.history_ids, "collate: history_ids", at::kInt, 1);
  check_tensor(a.plan, "collate: plan", at::kLong, 2);
  check_tensor(a.candidates, "collate: candidates", at::kInt, 2);
  TORCH_CHECK_VALUE(a.plan.is_cpu() && a.candidates.is_cpu(),
                    "collate: plan and candidates must be on the CPU");
  TORCH_CHECK_VALUE(a.plan.size(1) == 6, "collate: plan must have 6 columns");
  TORCH_CHECK_VALUE(a.plan.size(0) == a.candidates.size(0), "collate: plan has ", a.plan.size(0),
                    " rows and candidates ", a.candidates.size(0));
  TORCH_CHECK_VALUE(a.special_ids.size() == 5, "collate: special_ids must hold 5 ids");
  TORCH_CHECK_VALUE(a.seq_len >= 0, "collate: seq_len must not be negative");

  const auto* plan = reinterpret_cast<const PlanRow*>(a.plan.const_data_ptr<int64_t>());
  const auto* candidates = a.candidates.const_data_ptr<int32_t>();
  const int64_t num_utterances = a.utterance_offsets.numel() - 1;
  const int64_t num_candidates = a.candidates.size(1);
  for (int64_t i = 0; i < a.plan.size(0); ++i) {
    const PlanRow& row = plan[i];
    TORCH_CHECK_INDEX(row.persona_first >= 0 && row.persona_count >= 0 &&
                          row.persona_first + row.persona_count <= a.persona_ids.numel() &&
                          row.persona_rotation >= 0 && row.persona_rotation <= row.persona_count &&
                          row.persona_kept >= 0 && row.persona_kept <= row.persona_count &&
                          row.history_first >= 0 && row.history_count >= 0 &&
                          row.history_first + row.history_count <= a.history_ids.numel(),
                      "collate: row ", i, " of the plan points outside the store");
    for (int64_t j = 0; j < num_candidates; ++j) {
      const int32_t id = candidates[i * num_candidates + j];
      TORCH_CHECK_INDEX(id >= -1 && id < num_utterances, "collate: candidate ", j, " of row ", i,
                        " is utterance ", id, " of ", num_utterances);
      TORCH_CHECK_VALUE(id < 0 || j == 0 || candidates[i * num_candidates + j - 1] >= 0,
                        "collate: row ", i, " has a candidate behind a missing one");
    }
  }
}

inline CollateResult allocate_collate(const CollateArguments& a, bool pin_memory) {
  const auto options = a.tokens.options().dtype(at::kLong).pinned_memory(pin_memory);
  const int64_t batch = a.candidates.size(0), num_candidates = a.candidates.size(1);
  const auto sequences = [&] { return at::empty({batch, num_candidates, a.seq_len}, options); };
  return {sequences(), sequences(), sequences(), at::empty({batch, num_candidates}, options)};
}

inline CollateOutput pointers(const CollateResult& result) {
  return {std::get<0>(result).mutable_data_ptr<int64_t>(),
          std::get<1>(result).mutable_data_ptr<int64_t>(),
          std::get<2>(result).mutable_data_ptr<int64_t>(),
          std::get<3>(result).mutable_data_ptr<int64_t>()};
}

template <typename Token>
CollateInput<Token> collate_input(const CollateArguments& a, const PlanRow* plan,
                                  const int32_t* candidates) {
  return {
      static_cast<const Token*>(a.tokens.const_data_ptr()),
      a.utterance_offsets.const_data_ptr<int64_t>(),
      a.persona_ids.const_data_ptr<int32_t>(),
      a.history_ids.const_data_ptr<int32_t>(),
      plan,
      candidates,
      a.candidates.size(1),
      a.seq_len,
      {a.special_ids[0], a.special_ids[1], a.special_ids[2], a.special_ids[3], a.special_ids[4]}};
}

}  // namespace convai_fast
