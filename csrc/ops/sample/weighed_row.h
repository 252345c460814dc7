// A row of logits on the CPU: read, tempered, cut down and weighed.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "ops/sample/row.h"

#define CONVAI_FAST_KERNEL "ops/sample/passes.h"
#include "simd/each_isa.h"

namespace convai_fast::sample {

constexpr float kNever = -std::numeric_limits<float>::infinity();  // a logit's
constexpr float kAll = 2.0f;                                       // more than any weight
constexpr int64_t kStride = 256, kTaken = kStride / 32;            // of `take_sample`

class WeighedRow {
 public:
  WeighedRow(const Scratch& scratch, int64_t vocab_size)
      : scratch_(scratch), vocab_size_(vocab_size) {}

  // Looks through the row, which must stay there. Returns false if nothing can be drawn from it: it
  // holds a NaN or an infinity, or -inf alone.
  bool read(const float* logits) {
    logits_ = logits;
    largest_ = CONVAI_FAST_DISPATCH(block_maxima)(logits, vocab_size_, scratch_.maxima());
    return std::isfinite(largest_);
  }

  // Begins with all tokens.
  void temper(float temperature) {
    row_ = {logits_, vocab_size_, largest_, temperature};
    tokens_ = nullptr;
  }

  // What is left to draw from: all tokens, or a list of some.
  const Row& row() const { return row_; }
  bool has_all_tokens() const { return tokens_ == nullptr; }
  int64_t token_at(int64_t i) const { return tokens_ ? tokens_[i] : i; }

  const Scratch& scratch() const { return scratch_; }
  int64_t vocab_size() const { return vocab_size_; }
  float largest() const { return largest_; }

  int64_t first_largest() const {
    const float* maxima = scratch_.maxima();
    const int64_t block = std::find(maxima, maxima + num_blocks(vocab_size_), largest_) - maxima;
    return std::find(logits_ + block * kBlock, logits_ + vocab_size_, largest_) - logits_;
  }

  // One logit in 32. Returns how many they are.
  int64_t take_sample(float* sample) const {
    int64_t size = 0;
    for (int64_t begin = 0; begin + kTaken <= row_.size; begin += kStride, size += kTaken) {
      std::memcpy(sample + size, row_.logits + begin, kTaken * sizeof(float));
    }
    return size;
  }

  // Lists the tokens whose tempered logit reaches `bound`, in order. Returns how many they are.
  int64_t collect(float bound) const {
    return CONVAI_FAST_DISPATCH(collect)(row_, scratch_.maxima(), logit_bound(bound), bound,
                                         scratch_.kept());
  }

  // Turns the list of what was collected into what is left to draw from.
  void keep(int64_t count) {
    row_ = {scratch_.kept().values, count, 0.0f, 1.0f};
    tokens_ = scratch_.kept().places;
  }

  // Weighs what is left, and lists what the bracket holds in scratch().inside(). What reaches its
  // upper end is kept.
  void weigh(Bracket b) {
    bracket_ = b;
    least_kept_ = b.high;
    num_ties_ = 0;
    double* totals = scratch_.totals();
    const float* maxima = tokens_ ? nullptr : scratch_.maxima();
    const float bound = logit_bound(std::log(b.low) - 0.001f);
    count_ = CONVAI_FAST_DISPATCH(weigh)(row_, b, maxima, bound, totals, scratch_.above(),
                                         scratch_.inside(), scratch_.listed());
    total_ = std::accumulate(totals, totals + num_chunks(row_.size), 0.0);
  }

  // Keeps what of the list reaches `least`, too.
  void keep_listed(float least) {
    least_kept_ = least;
    CONVAI_FAST_DISPATCH(add_listed)(scratch_.inside(), scratch_.listed(), num_chunks(row_.size),
                                     least, scratch_.above());
  }

  // Of the equal weights just below what is kept, keeps so many, too: in the order of the
  // definition, for equal weights may still be different logits.
  void keep_ties(int64_t count) {
    int32_t* ties = scratch_.ties();
    const int64_t all = CONVAI_FAST_DISPATCH(places_of)(row_, tie_weight(), ties);
    const auto before = [&](int32_t i, int32_t j) {
      return row_.tempered(row_.logits[i]) > row_.tempered(row_.logits[j]);
    };
    if (!std::is_sorted(ties, ties + all, before)) std::stable_sort(ties, ties + all, before);
    num_ties_ = std::min(count, all);
    for (int64_t i = 0; i < num_ties_; ++i) scratch_.above()[ties[i] / kChunk] += tie_weight();
  }

  Bracket bracket() const { return bracket_; }
  int64_t num_listed() const { return count_; }
  double total() const { return total_; }

  // What is kept: the weights that reach this, and of those just below it num_ties(), which are at
  // scratch().ties(). scratch().above() has the mass of each chunk.
  float least_kept() const { return least_kept_; }
  int64_t num_ties() const { return num_ties_; }
  float tie_weight() const { return from_bits(bits(least_kept_) - 1); }

 private:
  // The logits whose tempered logit reaches `bound` reach this, with room for rounding.
  float logit_bound(float bound) const {
    const float offset = bound * row_.temperature;
    return largest_ + offset - 1e-6f * (std::abs(largest_) + std::abs(offset));
  }

  const Scratch& scratch_;
  const int64_t vocab_size_;
  const float* logits_;
  float largest_;

  Row row_;
  const int32_t* tokens_ = nullptr;

  Bracket bracket_;
  int64_t count_, num_ties_;
  float least_kept_;
  double total_;
};

}  // namespace convai_fast::sample
