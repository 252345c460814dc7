#include "cuda.h"
#include "ops/add_norm/cuda_kernel.cuh"

using namespace convai_fast::add_norm;

template <>
inline constexpr bool convai_fast::kIsUpperHalf<emulator::BFloat16> = true;

// kind: 0 float32, 1 bfloat16, 2 float16.
EMULATOR_EXPORT const char* add_norm(int64_t kind, const void* x, const void* residual,
                                     const void* weight, const void* bias, void* sum, void* normed,
                                     int64_t rows, int64_t n_embd, double eps, int64_t rms_norm,
                                     int64_t seed) {
  const auto run_as = [&]<typename Scalar>(Scalar) {
    const Input<Scalar> in{.x = static_cast<const Scalar*>(x),
                           .residual = static_cast<const Scalar*>(residual),
                           .weight = static_cast<const Scalar*>(weight),
                           .bias = static_cast<const Scalar*>(bias),
                           .sum = static_cast<Scalar*>(sum),
                           .normed = static_cast<Scalar*>(normed),
                           .n_embd = static_cast<int>(n_embd),
                           .eps = static_cast<float>(eps),
                           .rms_norm = rms_norm != 0};
    const emulator::Launch launch{.grid = {static_cast<unsigned>(rows)},
                                  .threads = static_cast<unsigned>(threads_for(n_embd)),
                                  .shared_bytes = {sizeof(BlockScratch)},
                                  .seed = static_cast<uint64_t>(seed)};
    return emulator::run(launch, [&] {
      BlockScratch& scratch = *emulator::shared<BlockScratch>(0);
      is_aligned(in) ? add_norm_block<Scalar, true>(in, scratch)
                     : add_norm_block<Scalar, false>(in, scratch);
    });
  };
  if (kind == 0) return run_as(float{});
  if (kind == 1) return run_as(emulator::BFloat16{});
  return run_as(emulator::Half{});
}
