// The vector loops of `sample`, compiled for each instruction set and chosen at run time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>

#include "convai_fast/cpu_features.h"

#if CONVAI_FAST_X86
#include <immintrin.h>
#endif

namespace convai_fast {

constexpr int64_t kBlock = 64;   // logits that share a maximum; arrays are padded to whole blocks
constexpr int64_t kChunk = 512;  // weights added up in float32 before their sum goes into a double
constexpr int kPivots = 7;

// Weights listed because they are in an interval.
struct Selection {
  int64_t count = 0;
  double mass_above = 0;  // of the weights that reach the interval's upper end
};

// See row_passes.h, where they are explained.
struct RowPasses {
  float (*block_maxima)(const float* logits, int64_t size, float* maxima);
  double (*exponentials)(const float* logits, int64_t size, float largest, float temperature,
                         float* weights);
  void (*chunk_masses)(const float* weights, int64_t size, float threshold, double* masses);
  void (*pivot_masses)(const float* weights, int64_t size, const float* pivots, double* masses);
  Selection (*select)(const float* weights, const int32_t* indices, int64_t size, float low,
                      float high, float* listed_weights, int32_t* listed_indices);
  int64_t (*collect)(const float* logits, int64_t size, const float* maxima, float logit_bound,
                     float largest, float temperature, float bound, float* listed, int32_t* tokens);
};

// For each set of lanes, those lanes packed to the front: AVX2 has no instruction that compacts.
struct Compaction {
  uint8_t lanes[256][8] = {};

  constexpr Compaction() {
    for (int set = 0; set < 256; ++set) {
      int count = 0;
      for (int lane = 0; lane < 8; ++lane) {
        if (set >> lane & 1) lanes[set][count++] = lane;
      }
    }
  }
};
inline constexpr Compaction kCompaction;

}  // namespace convai_fast

// Vectors never cross a function that is not inlined, so their calling convention does not matter.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

#define CONVAI_FAST_ISA portable
#define CONVAI_FAST_TARGET
#define CONVAI_FAST_WIDTH 4
#include "convai_fast/row_passes.h"
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_TARGET
#undef CONVAI_FAST_WIDTH

#if CONVAI_FAST_X86
#define CONVAI_FAST_ISA avx2
#define CONVAI_FAST_TARGET CONVAI_FAST_AVX2
#define CONVAI_FAST_WIDTH 8
#include "convai_fast/row_passes.h"
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_TARGET
#undef CONVAI_FAST_WIDTH

#define CONVAI_FAST_ISA avx512
#define CONVAI_FAST_TARGET CONVAI_FAST_AVX512
#define CONVAI_FAST_WIDTH 16
#include "convai_fast/row_passes.h"
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_TARGET
#undef CONVAI_FAST_WIDTH
#endif

#pragma GCC diagnostic pop

namespace convai_fast {

inline const RowPasses& row_passes(Isa isa) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) return avx512::kPasses;
  if (isa == Isa::kAvx2) return avx2::kPasses;
#endif
  return portable::kPasses;
}

}  // namespace convai_fast
