// The vector loops of `sample`, compiled for each instruction set and chosen at run time.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "simd/isa.h"

#if CONVAI_FAST_X86
#include <immintrin.h>
#endif

namespace convai_fast {

constexpr int64_t kBlock = 64;   // logits that share a maximum; arrays are padded to whole blocks
constexpr int64_t kChunk = 512;  // weights added up in float32 before their sum goes into a double
constexpr int kPivots = 7;

// Logits to draw from. The weight of each is exp((logit - largest) / temperature).
struct Row {
  const float* logits;
  int64_t size;
  float largest, temperature;
};

// An interval of weights, without its upper end.
struct Bracket {
  float low, high;
};

// Weights or logits, and where each comes from.
struct List {
  float* values;
  int32_t* places;

  List operator+(int64_t offset) const { return {values + offset, places + offset}; }
};

// See passes.h, where they are explained.
struct RowPasses {
  float (*block_maxima)(const float* logits, int64_t size, float* maxima);
  float (*exponentials)(const Row& row, float* weights);
  int64_t (*weigh)(const Row& row, int64_t begin, int64_t end, Bracket b, const float* maxima,
                   float logit_bound, double* totals, double* above, List list);
  double (*mass)(const float* weights, int64_t size);
  void (*pivot_masses)(const float* weights, int64_t size, const float* pivots, double* masses);
  int64_t (*select)(List from, int64_t size, Bracket b, List list);
  int64_t (*collect)(const Row& row, int64_t begin, int64_t end, const float* maxima,
                     float logit_bound, float bound, List list);
};

}  // namespace convai_fast

// Vectors never cross a function that is not inlined, so their calling convention does not matter.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wpsabi"

#define CONVAI_FAST_ISA portable
#define CONVAI_FAST_TARGET
#define CONVAI_FAST_WIDTH 4
#include "ops/sample/passes.h"
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_TARGET
#undef CONVAI_FAST_WIDTH

#if CONVAI_FAST_X86
#define CONVAI_FAST_ISA avx2
#define CONVAI_FAST_TARGET CONVAI_FAST_AVX2
#define CONVAI_FAST_WIDTH 8
#include "ops/sample/passes.h"
#undef CONVAI_FAST_ISA
#undef CONVAI_FAST_TARGET
#undef CONVAI_FAST_WIDTH

#define CONVAI_FAST_ISA avx512
#define CONVAI_FAST_TARGET CONVAI_FAST_AVX512
#define CONVAI_FAST_WIDTH 16
#include "ops/sample/passes.h"
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
