#include "cuda.h"
#include "ops/collate/cuda_kernel.cuh"

using namespace convai_fast::collate;

// With `offsets` the shared layout, else the padded one, which has neither positions nor branches.
EMULATOR_EXPORT const char* collate(
    int64_t is_wide, const void* tokens, int64_t num_tokens, const int64_t* utterance_offsets,
    int64_t num_utterances, const int32_t* persona_ids, const int32_t* history_ids,
    const int32_t* candidate_ids, const PlanRow* plan, int64_t batch, int64_t num_candidates,
    int64_t seq_len, const int64_t* offsets, int64_t max_length, const Layout* layout,
    int64_t* input_ids, int64_t* token_type_ids, int64_t* position_ids, int64_t* branch_ids,
    int64_t* labels, int64_t* mc_token_ids, int64_t seed) {
  const auto run_as = [&]<typename Token>(Token) {
    const Input<Token> in{.tokens = static_cast<const Token*>(tokens),
                          .utterance_offsets = utterance_offsets,
                          .num_tokens = num_tokens,
                          .num_utterances = num_utterances,
                          .persona_ids = persona_ids,
                          .history_ids = history_ids,
                          .candidate_ids = candidate_ids,
                          .plan = plan,
                          .num_candidates = num_candidates,
                          .seq_len = seq_len,
                          .offsets = offsets,
                          .max_length = max_length,
                          .layout = *layout};
    const int64_t blocks = offsets ? batch : batch * num_candidates;
    const emulator::Launch launch{.grid = {static_cast<unsigned>(blocks)},
                                  .threads = kThreads,
                                  .seed = static_cast<uint64_t>(seed)};
    return emulator::run(launch, [&] {
      if (offsets) {
        collate_shared_kernel(in, SharedOutput{.input_ids = input_ids,
                                               .token_type_ids = token_type_ids,
                                               .position_ids = position_ids,
                                               .branch_ids = branch_ids,
                                               .labels = labels,
                                               .mc_token_ids = mc_token_ids});
      } else {
        collate_kernel(in, PaddedOutput{.input_ids = input_ids,
                                        .token_type_ids = token_type_ids,
                                        .labels = labels,
                                        .mc_token_ids = mc_token_ids});
      }
    });
  };
  return is_wide ? run_as(int32_t{}) : run_as(uint16_t{});
}
