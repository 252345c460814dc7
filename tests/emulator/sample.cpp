#include "cuda.h"
#include "ops/sample/cuda_kernel.cuh"

using namespace convai_fast::sample;

namespace {

template <typename Logit, bool kInShared>
const char* run(const Input<Logit>& in, const Output& out, int64_t rows, int64_t num_blocks,
                int64_t seed) {
  const int64_t slice_bytes =
      kInShared ? TeamLogits<Logit, true>::slice_bytes(in.vocab_size, num_blocks) : 0;
  const emulator::Launch launch{
      .grid = {static_cast<unsigned>(rows * num_blocks)},
      .cluster_size = static_cast<unsigned>(num_blocks),
      .threads = kThreads,
      .shared_bytes = {sizeof(BlockScratch), static_cast<size_t>(slice_bytes)},
      .seed = static_cast<uint64_t>(seed)};
  return emulator::run(launch, [&] {
    sample_block<Logit, kInShared>(in, out, *emulator::shared<BlockScratch>(0),
                                   emulator::shared<Logit>(1));
  });
}

}  // namespace

// kind: 0 float32, 1 bfloat16, 2 float16.
EMULATOR_EXPORT const char* sample(int64_t kind, const void* logits, int64_t rows,
                                   int64_t vocab_size, int64_t row_stride, int64_t column_stride,
                                   const float* temperature, int64_t temperature_stride,
                                   const int64_t* top_k, int64_t top_k_stride, const float* top_p,
                                   int64_t top_p_stride, const float* min_p, int64_t min_p_stride,
                                   const int64_t* seeds, int64_t seeds_stride, const int64_t* steps,
                                   int64_t steps_stride, int64_t* token_ids, float* logprobs,
                                   int64_t num_blocks, int64_t in_shared, int64_t seed) {
  const auto run_as = [&]<typename Logit>(Logit) {
    const Input<Logit> in{.logits = static_cast<const Logit*>(logits),
                          .row_stride = row_stride,
                          .column_stride = column_stride,
                          .vocab_size = static_cast<int>(vocab_size),
                          .temperature = {temperature, temperature_stride},
                          .top_k = {top_k, top_k_stride},
                          .top_p = {top_p, top_p_stride},
                          .min_p = {min_p, min_p_stride},
                          .seeds = {seeds, seeds_stride},
                          .steps = {steps, steps_stride}};
    const Output out{.token_ids = token_ids, .logprobs = logprobs};
    return in_shared ? run<Logit, true>(in, out, rows, num_blocks, seed)
                     : run<Logit, false>(in, out, rows, num_blocks, seed);
  };
  if (kind == 0) return run_as(float{});
  if (kind == 1) return run_as(emulator::BFloat16{});
  return run_as(emulator::Half{});
}
