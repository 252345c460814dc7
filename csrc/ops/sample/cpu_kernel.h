// `sample` for one row on the CPU: no torch, raw pointers, no sort of the row.
#pragma once

#include <functional>
#include <memory>
#include <numeric>

#include "ops/sample/sample_passes.h"
#include "simd/philox.h"

namespace convai_fast {

struct SampleParameters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, step;
};

// What one row at a time needs beside the logits, for rows of up to `vocab_size`. Most of it is
// touched only where a filter leaves many tokens to choose from.
class SampleScratch {
 public:
  explicit SampleScratch(int64_t vocab_size)
      : size_(padded(vocab_size) + kBlock),
        num_maxima_(padded(size_ / kBlock)),
        memory_(new CacheLine[(7 * size_ + 2 * num_maxima_) / kPerLine + size_ / kChunk + 1]) {}

  int64_t vocab_size() const { return size_ - kBlock; }

  float* logits() const { return floats(); }  // a row that has to be converted
  List kept() const { return list(1); }       // what is left after top-k or min-p
  List inside() const { return list(3); }     // what the bracket of top-p holds
  List narrowed() const { return list(5); }   // the same of a narrower one
  float* maxima() const { return floats() + 7 * size_; }
  float* ordered_maxima() const { return maxima() + num_maxima_; }
  double* totals() const { return reinterpret_cast<double*>(ordered_maxima() + num_maxima_); }
  double* above() const { return totals() + size_ / kChunk + 1; }

  static int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

 private:
  // So that no vector lies in two lines of the cache.
  static constexpr int64_t kPerLine = 16;
  struct alignas(64) CacheLine {
    float values[kPerLine];
  };

  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }
  List list(int64_t i) const {
    float* values = floats() + i * size_;
    return {values, reinterpret_cast<int32_t*>(values + size_)};
  }

  int64_t size_, num_maxima_;
  std::unique_ptr<CacheLine[]> memory_;
};

// Into how many pieces a row is split, and what runs task(0), ..., task(pieces - 1), at the same
// time if it can. Pieces are whole chunks, so that their number changes nothing of what comes out.
struct Pieces {
  static constexpr int64_t kMost = 64;
  int64_t count = 1;
  std::function<void(int64_t pieces, const std::function<void(int64_t)>& task)> run;
};

class RowSampler {
 public:
  RowSampler(const RowPasses& passes, const SampleScratch& scratch, int64_t vocab_size,
             const Pieces& pieces)
      : passes_(passes), scratch_(scratch), pieces_(pieces), vocab_size_(vocab_size) {}

  // Looks through the row: float_row(begin, end) makes that part of it float32 and returns where
  // the row begins, which must stay there. Returns false if nothing can be drawn from the row: it
  // holds a NaN or an infinity, or -inf alone.
  template <class FloatRow>
  bool read(FloatRow float_row) {
    float largest[Pieces::kMost];
    const int64_t pieces = in_pieces(vocab_size_, [&](int64_t i, int64_t begin, int64_t end) {
      const float* logits = float_row(begin, end);
      largest[i] =
          passes_.block_maxima(logits + begin, end - begin, scratch_.maxima() + begin / kBlock);
      if (i == 0) logits_ = logits;
    });
    largest_ = *std::max_element(largest, largest + pieces);
    return std::isfinite(largest_) &&
           std::none_of(largest, largest + pieces, [](float m) { return std::isnan(m); });
  }

  int64_t sample(const SampleParameters& p) {
    if (p.temperature == 0) return first_largest();
    row_ = {logits_, vocab_size_, largest_, std::min(p.temperature, kLargestFloat)};
    tokens_ = nullptr;
    const bool has_top_p = p.top_p > 0 && p.top_p < 1;
    if (p.top_k > 0 && p.top_k < vocab_size_) {
      keep(keep_largest(p.top_k));
    } else if (p.min_p > 0 && !has_top_p) {
      // With room for the rounding of the logarithm; what is kept, is decided on the weights.
      keep(collect(std::log(std::min(p.min_p, 1.0f)) - 0.001f));
    }
    const float least = std::clamp(p.min_p, 0.0f, 1.0f);
    if (has_top_p) {
      nucleus(p.top_p, least);
    } else {
      weigh({least, least});
    }
    return draw(philox_uniform(p.seed, p.step));
  }

  // The log-probability under the softmax of the logits.
  float logprob(int64_t token) {
    row_ = {logits_, vocab_size_, largest_, 1.0f};
    weigh({0, 0});
    return static_cast<float>(logits_[token] - largest_ - std::log(total_));
  }

 private:
  static constexpr float kLargestFloat = std::numeric_limits<float>::max();
  static constexpr float kNever = -std::numeric_limits<float>::infinity();  // a logit's
  static constexpr float kAll = 2.0f;                                       // more than any weight
  static constexpr int64_t kSortable = 8;
  static constexpr int64_t kStride = 128, kTaken = kStride / 16;  // of the sample of a row

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

  float tempered(float logit) const { return (logit - row_.largest) / row_.temperature; }

  int64_t token_at(int64_t i) const { return tokens_ ? tokens_[i] : i; }

  int64_t first_largest() const {
    const float* maxima = scratch_.maxima();
    const int64_t block = std::find(maxima, maxima + num_blocks(), largest_) - maxima;
    return std::find(logits_ + block * kBlock, logits_ + vocab_size_, largest_) - logits_;
  }

  // The logits whose tempered logit reaches `bound` reach this, with room for rounding.
  float logit_bound(float bound) const {
    const float offset = bound * row_.temperature;
    return largest_ + offset - 1e-6f * (std::abs(largest_) + std::abs(offset));
  }

  // Lists the tokens whose tempered logit reaches `bound`, in order. Returns how many they are.
  int64_t collect(float bound) const {
    return list_in_pieces(row_.size, scratch_.kept(), [&](int64_t begin, int64_t end, List list) {
      return passes_.collect(row_, begin, end, scratch_.maxima(), logit_bound(bound), bound, list);
    });
  }

  // Turns the list of what was collected into the row to go on with.
  void keep(int64_t count) {
    row_ = {scratch_.kept().values, count, 0.0f, 1.0f};
    tokens_ = scratch_.kept().places;
  }

  // Lists the k largest, and what ties with the last of them.
  int64_t keep_largest(int64_t k) const {
    int64_t count = collect(bound_of_largest(k));
    if (count < k) count = collect(kNever);
    const List kept = scratch_.kept();
    float* ordered = scratch_.inside().values;  // not in use yet
    std::copy_n(kept.values, count, ordered);
    std::nth_element(ordered, ordered + k - 1, ordered + count, std::greater<>());
    const float kth_largest = ordered[k - 1];
    int64_t num_kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float z = kept.values[i];
      kept.values[num_kept] = z;
      kept.places[num_kept] = kept.places[i];
      num_kept += z >= kth_largest;
    }
    return num_kept;
  }

  // What the k largest tempered logits, and not many more, reach in all likelihood: for few of
  // them surely, since k blocks have a maximum that reaches the k-th largest maximum.
  float bound_of_largest(int64_t k) const {
    float* ordered = scratch_.inside().values;
    int64_t size = num_blocks(), rank = k - 1;
    if (k <= size / 2) {
      std::copy_n(scratch_.maxima(), size, ordered);
    } else {
      size = take_sample(ordered);
      const double expected = static_cast<double>(k) * kTaken / kStride;
      rank = static_cast<int64_t>(expected + 4 * std::sqrt(expected) + 4);
      if (rank >= size) return kNever;
    }
    std::nth_element(ordered, ordered + rank, ordered + size, std::greater<>());
    return tempered(ordered[rank]);
  }

  // One logit in 16. Returns how many they are.
  int64_t take_sample(float* sample) const {
    int64_t size = 0;
    for (int64_t begin = 0; begin + kTaken <= row_.size; begin += kStride, size += kTaken) {
      std::copy_n(row_.logits + begin, kTaken, sample + size);
    }
    return size;
  }

  // Weighs the row, and lists what the bracket holds.
  void weigh(Bracket b) {
    bracket_ = b;
    double *totals = scratch_.totals(), *above = scratch_.above();
    const float* maxima = tokens_ ? nullptr : scratch_.maxima();
    const float bound = logit_bound(std::log(b.low) - 0.001f);
    count_ = list_in_pieces(row_.size, scratch_.inside(), [&](int64_t i, int64_t end, List list) {
      return passes_.weigh(row_, i, end, b, maxima, bound, totals, above, list);
    });
    total_ = std::accumulate(totals, totals + num_chunks(row_.size), 0.0);
  }

  // For top-p: weighs the row, and leaves in the list what is kept of the bracket, so that the kept
  // mass reaches that share of all; nothing below `least`.
  void nucleus(float top_p, float least) {
    weigh(guess(top_p, least));
    const List inside = scratch_.inside();
    double target, above, mass;
    for (bool again = true;; again = false) {
      pad(inside.values, count_);
      const double* masses = scratch_.above();
      above = std::accumulate(masses, masses + num_chunks(row_.size), 0.0);
      mass = passes_.mass(inside.values, padded(count_));
      target = top_p * total_;
      // Where the guess was wrong, the other side of it is right.
      if (again && above >= target) {
        weigh({bracket_.high, kAll});
      } else if (again && above + mass < target && bracket_.low > least) {
        weigh({lowest(total_ - target, least), bracket_.low});
      } else {
        break;
      }
    }
    if (above + mass < target) return;  // min-p keeps less

    const List list = scratch_.narrowed();
    Bracket b = bracket_;
    // At first the list's places are those in `inside`.
    List from{inside.values, nullptr};
    int64_t count = count_;
    do {
      const Bracket narrower = narrow(b, from.values, count, target, &above);
      count = passes_.select(from, padded(count), narrower, list);
      pad(list.values, count);
      b = narrower;
      from = list;
    } while (count > kSortable && bits(b.high) - bits(b.low) > 1);

    // In the order of the definition; equal weights may still be different logits.
    const auto before = [&](int32_t i, int32_t j) {
      const float a = tempered(row_.logits[inside.places[i]]);
      const float b = tempered(row_.logits[inside.places[j]]);
      return a > b || (a == b && i < j);
    };
    if (!std::is_sorted(list.places, list.places + count, before)) {
      std::sort(list.places, list.places + count, before);
    }
    for (int64_t i = 0; i < count; ++i) {
      float& weight = inside.values[list.places[i]];
      if (above < target) {
        above += weight;
      } else {
        weight = 0;
      }
    }
    count_ = passes_.select(inside, padded(count_), {b.low, kAll}, inside);
  }

  // An eighth of the bracket in which the mass of what is kept, `above` and of the list, reaches
  // the target. Adds what of the list is above it.
  Bracket narrow(Bracket b, const float* list, int64_t count, double target, double* above) const {
    const int64_t width = bits(b.high) - bits(b.low);
    float edges[kPivots + 2];
    for (int i = 0; i < kPivots + 2; ++i) {
      edges[i] = from_bits(static_cast<int32_t>(bits(b.low) + width * i / (kPivots + 1)));
    }
    double masses[kPivots + 1];  // of what reaches edges[1], edges[2], ...
    passes_.pivot_masses(list, padded(count), edges + 1, masses);
    masses[kPivots] = 0;
    int i = 0;
    while (i < kPivots && *above + masses[i] >= target) ++i;
    *above += masses[i];
    return {edges[i], edges[i + 1]};
  }

  // Were the threshold lower, what is below it would not amount to the tail that is cut off.
  float lowest(double tail, float least) const {
    const auto bound = static_cast<float>(0.999 * tail / static_cast<double>(row_.size));
    return std::max({bound, least, std::numeric_limits<float>::denorm_min()});
  }

  // Where the threshold of top-p is likely to be: what is below it adds up to a share of the mass
  // that the maxima of the blocks tell together with one in 16 of the other weights. The bracket
  // ends where the estimate is two and a half standard deviations away, counting as seen one more
  // weight of the size in question.
  Bracket guess(float top_p, float least) const {
    constexpr int kShift = 19, kNumBins = 0x40000000 >> kShift;  // 16 bins for each power of two
    constexpr double kScale = kStride / kTaken;
    if (tokens_ || row_.size < 64 * kStride) return {lowest(1 - top_p, least), kAll};
    float* logits = scratch_.narrowed().values;
    const int64_t size = take_sample(logits);
    for (int64_t i = 0; i < size; i += kTaken) {
      const float largest = scratch_.maxima()[i / kTaken * (kStride / kBlock)];
      for (int64_t j = i; j < i + kTaken; ++j) logits[j] = logits[j] < largest ? logits[j] : kNever;
    }
    float *weights = scratch_.inside().values, *largest = scratch_.ordered_maxima();
    double total = passes_.exponentials(
        {scratch_.maxima(), num_blocks(), largest_, row_.temperature}, largest);
    const float low = lowest((1 - top_p) * total, least);
    total += kScale * passes_.exponentials({logits, size, largest_, row_.temperature}, weights);

    float exact[kNumBins], sampled[kNumBins];
    // What is too small to matter is spread over the lowest bins, lest each addition wait for the
    // one before.
    const int first = std::max(0, (bits(low) >> kShift) - static_cast<int>(kTaken));
    std::fill(exact + first, exact + kNumBins, 0.0f);
    std::fill(sampled + first, sampled + kNumBins, 0.0f);
    const auto add = [first](const float* values, int64_t count, float* bins) {
      for (int64_t begin = 0; begin < count; begin += kTaken) {
        int bin[kTaken];
        for (int i = 0; i < kTaken; ++i) {
          bin[i] = std::max(first + i, bits(values[begin + i]) >> kShift);
        }
        for (int i = 0; i < kTaken; ++i) bins[bin[i]] += values[begin + i];
      }
    };
    add(largest, padded(num_blocks()), exact);
    add(weights, size, sampled);

    const auto edge = [](int bin) { return from_bits((bin + 1) << kShift); };
    // What is below counts for its share top_p of the difference, what is above for the rest.
    const double share_below = top_p * kScale, share_above = (1 - top_p) * kScale;
    double variance = 0;
    for (int bin = first; bin < kNumBins; ++bin) {
      variance += share_above * share_above * sampled[bin] * edge(bin);
    }
    Bracket b{low, kAll};
    double below = 0;
    for (int bin = first; bin < kNumBins; ++bin) {
      below += exact[bin] + kScale * sampled[bin];
      variance +=
          (share_below * share_below - share_above * share_above) * sampled[bin] * edge(bin);
      const double away = below - (1 - top_p) * total;
      const double one_more = kScale * edge(bin);
      if (away * away < 6 * (variance + one_more * one_more)) continue;
      if (away > 0) {
        b.high = std::max(edge(bin), low);
        break;
      }
      b.low = std::max(edge(bin), low);
    }
    return b;
  }

  // The first token whose cumulative mass exceeds `uniform` times the mass of all that is kept.
  int64_t draw(double uniform) const {
    double* masses = scratch_.above();
    const List inside = scratch_.inside();
    for (int64_t i = 0; i < count_;) {
      const int64_t chunk = inside.places[i] / kChunk;
      double mass = 0;
      for (; i < count_ && inside.places[i] / kChunk == chunk; ++i) {
        mass += inside.values[i];
      }
      masses[chunk] += mass;
    }
    const int64_t last = num_chunks(row_.size) - 1;
    const double target = uniform * std::accumulate(masses, masses + last + 1, 0.0);
    double cumulative = 0;
    int64_t chunk = 0;
    while (chunk < last && cumulative + masses[chunk] <= target) cumulative += masses[chunk++];
    // Rounding may lead beyond the last that is kept.
    while (chunk > 0 && !(masses[chunk] > 0)) --chunk;

    // The weights of that chunk, which were not kept.
    float weights[kChunk];
    const int64_t begin = chunk * kChunk, size = std::min(kChunk, row_.size - begin);
    passes_.exponentials({row_.logits + begin, size, row_.largest, row_.temperature}, weights);
    for (int64_t i = 0; i < size; ++i) weights[i] = weights[i] >= bracket_.high ? weights[i] : 0;
    const int32_t* first = std::lower_bound(inside.places, inside.places + count_, begin);
    for (int64_t i = first - inside.places; i < count_ && inside.places[i] < begin + size; ++i) {
      weights[inside.places[i] - begin] = inside.values[i];
    }
    int64_t i = 0;
    for (; i < size; ++i) {
      cumulative += weights[i];
      if (cumulative > target) return token_at(begin + i);
    }
    // Added up one by one, a chunk may come out a little smaller than its mass: then its last.
    do --i;
    while (i > 0 && !(weights[i] > 0));
    return token_at(begin + i);
  }

  int64_t num_blocks() const { return (vocab_size_ + kBlock - 1) / kBlock; }

  static int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

  static int64_t padded(int64_t size) { return SampleScratch::padded(size); }
  static void pad(float* list, int64_t count) {
    std::fill(list + count, list + padded(count), 0.0f);
  }

  // Floats that are not negative order as their bits do.
  static int32_t bits(float value) { return std::bit_cast<int32_t>(value); }
  static float from_bits(int32_t value) { return std::bit_cast<float>(value); }

  const RowPasses& passes_;
  const SampleScratch& scratch_;
  const Pieces& pieces_;
  const int64_t vocab_size_;
  const float* logits_;
  float largest_;

  // What is drawn from: the row, or the list of what is kept of it and the tokens that those are.
  Row row_;
  const int32_t* tokens_ = nullptr;

  // What is kept of it: the weights that reach the bracket's upper end, and those that are listed.
  Bracket bracket_;
  int64_t count_;
  double total_;
};

}  // namespace convai_fast
