// `sample` for one row on the CPU: no torch, raw pointers, no sort of the row.
#pragma once

#include "ops/sample/top_k.h"
#include "ops/sample/top_p.h"
#include "simd/philox.h"

namespace convai_fast::sample {

struct Parameters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, step;
};

// The first token whose cumulative mass exceeds `uniform` times the mass of all that is kept.
inline int64_t draw(const WeighedRow& row, double uniform) {
  const Row& logits = row.row();
  const double* masses = row.scratch().above();
  const int64_t last = num_chunks(logits.size) - 1;
  const double target = uniform * std::accumulate(masses, masses + last + 1, 0.0);
  double cumulative = 0;
  int64_t chunk = 0;
  while (chunk < last && cumulative + masses[chunk] <= target) cumulative += masses[chunk++];
  // Rounding may lead beyond the last that is kept.
  while (chunk > 0 && !(masses[chunk] > 0)) --chunk;

  // The weights of that chunk, which were not kept.
  float weights[kChunk];
  const int64_t begin = chunk * kChunk, size = std::min(kChunk, logits.size - begin);
  CONVAI_FAST_DISPATCH(exponentials)(
      {logits.logits + begin, size, logits.largest, logits.temperature}, weights);
  for (int64_t i = 0; i < size; ++i) weights[i] = weights[i] >= row.least_kept() ? weights[i] : 0;
  const int32_t* ties = row.scratch().ties();
  for (int64_t i = 0; i < row.num_ties(); ++i) {
    if (ties[i] / kChunk == chunk) weights[ties[i] - begin] = row.tie_weight();
  }
  int64_t i = 0;
  for (; i < size; ++i) {
    cumulative += weights[i];
    if (cumulative > target) return row.token_at(begin + i);
  }
  // Added up one by one, a chunk may come out a little smaller than its mass: then its last.
  do --i;
  while (i > 0 && !(weights[i] > 0));
  return row.token_at(begin + i);
}

// Draws a token from a row that has been read.
inline int64_t sample_kernel(WeighedRow& row, const Parameters& p) {
  if (p.temperature == 0) return row.first_largest();
  row.temper(std::min(p.temperature, std::numeric_limits<float>::max()));
  const bool has_top_p = p.top_p > 0 && p.top_p < 1;
  if (p.top_k > 0 && p.top_k < row.vocab_size()) {
    row.keep(collect_largest(row, p.top_k));
  } else if (p.min_p > 0 && !has_top_p) {
    // With room for the rounding of the logarithm; what is kept, is decided on the weights.
    row.keep(row.collect(std::log(std::min(p.min_p, 1.0f)) - 0.001f));
  }
  const float least = std::clamp(p.min_p, 0.0f, 1.0f);
  if (has_top_p) {
    nucleus(row, p.top_p, least);
  } else {
    row.weigh({least, least});
  }
  return draw(row, simd::philox_uniform(p.seed, p.step));
}

// The log-probability under the softmax of the logits of a row that has been read.
inline float logprob(WeighedRow& row, int64_t token) {
  row.temper(1.0f);
  row.weigh({0, 0});
  return static_cast<float>(row.row().logits[token] - row.largest() - std::log(row.total()));
}

}  // namespace convai_fast::sample
