// `sample` on a GPU: no torch.
#pragma once

#include <cstdio>

#include "ops/device_assert.cuh"
#include "ops/sample/cuda_row.cuh"
#include "simd/philox.h"

namespace convai_fast::sample {

// A tensor with one value a row; stride 0 where all rows share it.
template <typename T>
struct PerRow {
  const T* data;
  int64_t stride;

  __device__ T operator[](int64_t row) const { return data[row * stride]; }
};

template <typename Logit>
struct Input {
  const Logit* logits;
  int64_t row_stride, column_stride;
  int vocab_size;
  PerRow<float> temperature;
  PerRow<int64_t> top_k;
  PerRow<float> top_p, min_p;
  PerRow<int64_t> seeds, steps;
};

struct Output {
  int64_t* token_ids;
  float* logprobs;  // null unless asked for
};

// The tokens that the filters keep: all whose key is smaller, and those of this very key that come
// before token `ties_end`.
struct Edge {
  uint32_t key;
  int ties_end;

  __device__ bool keeps(int i, uint32_t other) const {
    return (other < key) | ((other == key) & (i < ties_end));  // without a branch
  }
};

template <typename Row>
__device__ Edge find_edge(Row& row, int64_t top_k, float top_p, float min_p) {
  Edge edge{kMasslessKey - 1, row.vocab_size()};
  if (top_k > 0 && top_k < row.vocab_size()) {
    const auto one = [](uint32_t) { return uint32_t{1}; };
    // If fewer than k tokens have mass, all that have are kept.
    const auto k_at_most = [&](uint64_t total) { return min(static_cast<uint64_t>(top_k), total); };
    edge.key = row.select(edge.key + 1, one, k_at_most).key;
  }
  if (top_p > 0 && top_p < 1) {
    // Masses are whole numbers: mass before a token < p * total is mass before it < limit.
    uint64_t limit = 0;
    const auto limit_of = [&](uint64_t total) {
      return limit = __double2ull_ru(static_cast<double>(top_p) * static_cast<double>(total));
    };
    const auto mass_of = [](uint32_t key) { return mass(key); };
    const Selected last = row.select(edge.key + 1, mass_of, limit_of);
    // Of tokens that tie at the edge, so many are kept as it takes to reach the limit.
    const uint64_t each = mass(last.key);
    const uint64_t needed = (limit - last.before + each - 1) / each;
    edge.key = last.key;
    if (needed < last.weight / each) {
      const auto ties = [&](int, uint32_t key) { return uint64_t{key == last.key}; };
      edge.ties_end = row.locate(last.key + 1, ties, [&](uint64_t) { return needed - 1; }) + 1;
    }
  }
  if (min_p > 0) {
    // exp(-gap) >= min_p is gap <= -log(min_p); the largest itself is always kept.
    const double largest_gap = 0.0 - log(fmin(static_cast<double>(min_p), 1.0));
    const uint32_t key = __float_as_uint(__double2float_rd(largest_gap));
    if (key < edge.key) edge = {key, row.vocab_size()};
  }
  return edge;
}

// What a block does for the row of its team; see `TeamRow`.
template <typename Logit, bool kInShared>
__device__ void sample_block(const Input<Logit>& in, const Output& out, BlockScratch& scratch,
                             Logit* slice) {
  const int64_t n = blockIdx.x / Team::size();
  const bool leads = Team::rank() == 0 && threadIdx.x == 0;
  const TeamLogits<Logit, kInShared> logits(in.logits + n * in.row_stride, in.column_stride,
                                            in.vocab_size, slice);
  TeamRow<Logit, kInShared> row(logits, scratch);
  const float largest = row.read();
  const float temperature = in.temperature[n];
  if (!isfinite(largest)) {  // nothing can be drawn: whoever fetches the tokens sees it
    if (leads) {
      out.token_ids[n] = -1;
      if (out.logprobs != nullptr) out.logprobs[n] = NAN;
    }
    Team::sync();
    return;
  }
  // An exception would need the host to wait. An assertion surfaces at its next synchronisation;
  // the line printed before names the row.
  if (leads && !(temperature >= 0)) {
    printf("sample: the temperature of row %lld is %f\n", static_cast<long long>(n), temperature);
    assert(false && "sample: a temperature is negative or NaN");
  }

  // Greedy is: keep the largest only, and draw the first that is kept.
  const bool greedy = temperature == 0;
  const uint64_t unfiltered = out.logprobs != nullptr ? row.unfiltered_mass() : 0;
  row.set_temperature(greedy ? 1 : temperature);
  const Edge edge =
      greedy ? Edge{0, in.vocab_size} : find_edge(row, in.top_k[n], in.top_p[n], in.min_p[n]);
  const uint64_t random = greedy ? 0 : simd::philox(in.seeds[n], in.steps[n]);
  // u = random / 2^32, and u * total rounded down to a whole number, which changes no comparison
  // with one: exact, and below the total, so that a token that is kept is always found.
  const auto u_times = [&](uint64_t total) { return __umul64hi(random << 32, total); };
  const auto kept_mass = [&](int i, uint32_t key) {
    const uint64_t of_token = mass(key);
    return edge.keeps(i, key) ? of_token : 0;
  };
  const int token = row.locate(edge.key + 1, kept_mass, u_times);

  if (leads) {
    out.token_ids[n] = token;
    if (out.logprobs != nullptr) {
      out.logprobs[n] = (logits.logit(token) - largest) - log(unfiltered * 0x1p-40);
    }
  }
}

}  // namespace convai_fast::sample
