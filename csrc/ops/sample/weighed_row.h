// A row of logits on the CPU: read, tempered, cut down and weighed.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <numeric>

#include "ops/sample/row.h"

#define CONVAI_FAST_KERNEL "ops/sample/passes.h"
#include "simd/each_isa.h"

namespace convai_fast::sample {

// Into how many pieces a row is split, and what runs task(0), ..., task(pieces - 1), at the same
// time if it can. Pieces are whole chunks, so that their number changes nothing of what comes out.
struct Pieces {
  static constexpr int64_t kMost = 64;
  int64_t count = 1;
  std::function<void(int64_t pieces, const std::function<void(int64_t)>& task)> run;
};

constexpr float kNever = -std::numeric_limits<float>::infinity();  // a logit's
constexpr float kAll = 2.0f;                                       // more than any weight
constexpr int64_t kStride = 128, kTaken = kStride / 16;            // of `take_sample`

class WeighedRow {
 public:
  WeighedRow(const Scratch& scratch, int64_t vocab_size, const Pieces& pieces)
      : scratch_(scratch), pieces_(pieces), vocab_size_(vocab_size) {}

  // Looks through the row: float_row(begin, end) makes that part of it float32 and returns where
  // the row begins, which must stay there. Returns false if nothing can be drawn from the row: it
  // holds a NaN or an infinity, or -inf alone.
  template <class FloatRow>
  bool read(FloatRow float_row) {
    float largest[Pieces::kMost];
    const int64_t pieces = in_pieces(vocab_size_, [&](int64_t i, int64_t begin, int64_t end) {
      const float* logits = float_row(begin, end);
      float* maxima = scratch_.maxima() + begin / kBlock;
      largest[i] = CONVAI_FAST_DISPATCH(block_maxima)(logits + begin, end - begin, maxima);
      if (i == 0) logits_ = logits;
    });
    largest_ = *std::max_element(largest, largest + pieces);
    return std::isfinite(largest_) &&
           std::none_of(largest, largest + pieces, [](float m) { return std::isnan(m); });
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

  // One logit in 16. Returns how many they are.
  int64_t take_sample(float* sample) const {
    int64_t size = 0;
    for (int64_t begin = 0; begin + kTaken <= row_.size; begin += kStride, size += kTaken) {
      std::copy_n(row_.logits + begin, kTaken, sample + size);
    }
    return size;
  }

  // Lists the tokens whose tempered logit reaches `bound`, in order. Returns how many they are.
  int64_t collect(float bound) const {
    return list_in_pieces(row_.size, scratch_.kept(), [&](int64_t begin, int64_t end, List list) {
      return CONVAI_FAST_DISPATCH(collect)(row_, begin, end, scratch_.maxima(), logit_bound(bound),
                                           bound, list);
    });
  }

  // Turns the list of what was collected into what is left to draw from.
  void keep(int64_t count) {
    row_ = {scratch_.kept().values, count, 0.0f, 1.0f};
    tokens_ = scratch_.kept().places;
  }

  // Weighs what is left, and lists what the bracket holds in scratch().inside().
  void weigh(Bracket b) {
    bracket_ = b;
    double *totals = scratch_.totals(), *above = scratch_.above();
    const float* maxima = tokens_ ? nullptr : scratch_.maxima();
    const float bound = logit_bound(std::log(b.low) - 0.001f);
    count_ = list_in_pieces(row_.size, scratch_.inside(), [&](int64_t i, int64_t end, List list) {
      return CONVAI_FAST_DISPATCH(weigh)(row_, i, end, b, maxima, bound, totals, above, list);
    });
    total_ = std::accumulate(totals, totals + num_chunks(row_.size), 0.0);
  }

  // What is kept: the weights that reach the bracket's upper end, and those that are listed.
  Bracket bracket() const { return bracket_; }
  int64_t num_listed() const { return count_; }
  void set_num_listed(int64_t count) { count_ = count; }
  double total() const { return total_; }

 private:
  // Calls pass(i, begin, end) for each piece of `size` elements. Returns how many pieces they are.
  template <class Pass>
  int64_t in_pieces(int64_t size, Pass pass) const {
    const int64_t chunks = num_chunks(size), pieces = std::min(pieces_.count, chunks);
    const auto piece = [&](int64_t i) {
      pass(i, chunks * i / pieces * kChunk, std::min(size, chunks * (i + 1) / pieces * kChunk));
    };
    if (pieces > 1) {
      pieces_.run(pieces, piece);
    } else {
      piece(0);
    }
    return std::max<int64_t>(pieces, 1);
  }

  // The same for a pass(begin, end, list) that lists what it finds. Returns how much that is.
  template <class Pass>
  int64_t list_in_pieces(int64_t size, List list, Pass pass) const {
    int64_t begins[Pieces::kMost], counts[Pieces::kMost];
    const int64_t pieces = in_pieces(size, [&](int64_t i, int64_t begin, int64_t end) {
      begins[i] = begin;
      counts[i] = pass(begin, end, list + begin);
    });
    int64_t count = counts[0];
    for (int64_t i = 1; i < pieces; ++i) {
      std::copy_n(list.values + begins[i], counts[i], list.values + count);
      std::copy_n(list.places + begins[i], counts[i], list.places + count);
      count += counts[i];
    }
    return count;
  }

  // The logits whose tempered logit reaches `bound` reach this, with room for rounding.
  float logit_bound(float bound) const {
    const float offset = bound * row_.temperature;
    return largest_ + offset - 1e-6f * (std::abs(largest_) + std::abs(offset));
  }

  const Scratch& scratch_;
  const Pieces& pieces_;
  const int64_t vocab_size_;
  const float* logits_;
  float largest_;

  Row row_;
  const int32_t* tokens_ = nullptr;

  Bracket bracket_;
  int64_t count_;
  double total_;
};

}  // namespace convai_fast::sample
