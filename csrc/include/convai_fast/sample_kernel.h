// `sample` for one row on the CPU: no torch, raw pointers, no sort of the row.
#pragma once

#include <bit>
#include <cmath>
#include <functional>
#include <memory>
#include <numeric>
#include <utility>

#include "convai_fast/philox.h"
#include "convai_fast/sample_passes.h"

namespace convai_fast {

struct SampleParameters {
  float temperature;
  int64_t top_k;
  float top_p, min_p;
  uint64_t seed, step;
};

// So that no vector of the scratch lies in two lines of the cache.
constexpr int64_t kFloatsPerLine = 16;
struct alignas(64) CacheLine {
  float values[kFloatsPerLine];
};

// What one thread needs beside the logits, for rows of `vocab_size`. Most of it is touched only
// where a filter leaves many tokens to choose from.
struct SampleScratch {
  explicit SampleScratch(int64_t vocab_size)
      : num_blocks((vocab_size + kBlock - 1) / kBlock),
        size((num_blocks + 1) * kBlock),
        lines(new CacheLine[(3 * size + 2 * num_blocks) / kFloatsPerLine + 1]),
        integers(new int32_t[2 * size]),
        masses(new double[size / kChunk + 1]) {}

  float* floats() const { return reinterpret_cast<float*>(lines.get()); }
  float* weights() const { return floats(); }
  float* listed() const { return floats() + size; }
  float* logits() const { return floats() + 2 * size; }  // a row that has to be converted
  float* maxima() const { return floats() + 3 * size; }
  float* ordered_maxima() const { return maxima() + num_blocks; }
  int32_t* indices() const { return integers.get(); }
  int32_t* tokens() const { return integers.get() + size; }

  int64_t num_blocks, size;
  std::unique_ptr<CacheLine[]> lines;
  std::unique_ptr<int32_t[]> integers;
  std::unique_ptr<double[]> masses;
};

class RowSampler {
 public:
  RowSampler(const RowPasses& passes, const SampleScratch& scratch, int64_t vocab_size)
      : passes_(passes), scratch_(scratch), vocab_size_(vocab_size) {}

  // Looks through the row, which must stay where it is. Returns false if nothing can be drawn from
  // it: it holds a NaN or an infinity, or -inf alone.
  bool read(const float* logits) {
    logits_ = logits;
    largest_ = passes_.block_maxima(logits, vocab_size_, scratch_.maxima());
    return std::isfinite(largest_);
  }

  int64_t sample(const SampleParameters& p) {
    if (p.temperature == 0) return first_largest();
    temperature_ = std::min(p.temperature, std::numeric_limits<float>::max());
    const bool has_top_k = p.top_k > 0 && p.top_k < vocab_size_;
    const bool has_top_p = p.top_p > 0 && p.top_p < 1;
    double total;
    tokens_ = nullptr;
    size_ = vocab_size_;
    if (has_top_k) {
      total = weigh(keep_largest(p.top_k));
    } else if (p.min_p > 0 && !has_top_p) {
      // With room for the rounding of the logarithm; what is kept, is decided on the weights.
      total = weigh(collect(std::log(std::min(p.min_p, 1.0f)) - 0.001f));
    } else {
      total = passes_.exponentials(logits_, vocab_size_, largest_, temperature_, weights());
    }
    float threshold = 0;
    if (has_top_p) threshold = nucleus(p.top_p * total, total);
    if (p.min_p > threshold) threshold = std::min(p.min_p, 1.0f);
    return draw(threshold, philox_uniform(p.seed, p.step));
  }

  // The log-probability under the softmax of the logits. Overwrites the weights.
  float logprob(int64_t token) const {
    const double total = passes_.exponentials(logits_, vocab_size_, largest_, 1.0f, weights());
    return static_cast<float>(logits_[token] - largest_ - std::log(total));
  }

 private:
  float* weights() const { return scratch_.weights(); }

  float tempered(float logit) const { return (logit - largest_) / temperature_; }

  int64_t token_at(int64_t i) const { return tokens_ ? tokens_[i] : i; }

  int64_t first_largest() const {
    const float* maxima = scratch_.maxima();
    const int64_t block = std::find(maxima, maxima + scratch_.num_blocks, largest_) - maxima;
    return std::find(logits_ + block * kBlock, logits_ + vocab_size_, largest_) - logits_;
  }

  // Lists the tokens whose tempered logit reaches `bound`, in order. Returns how many they are.
  int64_t collect(float bound) const {
    // The same bound on the logits themselves, with room for rounding.
    const float offset = bound * temperature_;
    const float room = 1e-6f * (std::abs(largest_) + std::abs(offset));
    return passes_.collect(logits_, vocab_size_, scratch_.maxima(), largest_ + offset - room,
                           largest_, temperature_, bound, scratch_.listed(), scratch_.tokens());
  }

  // Lists the k largest, and what ties with the last of them. k blocks have a maximum that reaches
  // the k-th largest maximum, so that the k-th largest logit does, too.
  int64_t keep_largest(int64_t k) const {
    float bound = -std::numeric_limits<float>::infinity();
    if (k <= scratch_.num_blocks) {
      float* maxima = scratch_.ordered_maxima();
      std::copy_n(scratch_.maxima(), scratch_.num_blocks, maxima);
      std::nth_element(maxima, maxima + k - 1, maxima + scratch_.num_blocks, std::greater<>());
      bound = tempered(maxima[k - 1]);
    }
    const int64_t count = collect(bound);
    float* listed = scratch_.listed();
    float* ordered = weights();  // not in use yet
    std::copy_n(listed, count, ordered);
    std::nth_element(ordered, ordered + k - 1, ordered + count, std::greater<>());
    const float kth_largest = ordered[k - 1];
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const float z = listed[i];
      listed[kept] = z;
      scratch_.tokens()[kept] = scratch_.tokens()[i];
      kept += z >= kth_largest;
    }
    return kept;
  }

  // Turns the list into the row to go on with: its weights, and the tokens they belong to.
  double weigh(int64_t count) {
    tokens_ = scratch_.tokens();
    size_ = count;
    return passes_.exponentials(scratch_.listed(), count, 0.0f, 1.0f, weights());
  }

  // For top-p: what reaches `high` falls short of the target, and what reaches `low` does not.
  struct Bracket {
    float low, high;
  };

  // Lists what the bracket holds of the row.
  Selection list(const Bracket& b) const {
    return passes_.select(weights(), nullptr, padded(size_), b.low, b.high, scratch_.listed(),
                          scratch_.indices());
  }

  double listed_mass(int64_t count) const {
    std::fill(scratch_.listed() + count, scratch_.listed() + padded(count), 0.0f);
    double* masses = scratch_.masses.get();
    passes_.chunk_masses(scratch_.listed(), padded(count), 0.0f, masses);
    return std::accumulate(masses, masses + num_chunks(count), 0.0);
  }

  // The smallest weight that top-p keeps, so that the kept mass reaches `target`. Weights as large
  // that it does not keep become 0.
  float nucleus(double target, double total) const {
    // Were the threshold lower, what is below it would not amount to the tail that is cut off.
    const float least = static_cast<float>(0.999 * (total - target) / size_);
    const Bracket whole{std::max(least, std::numeric_limits<float>::denorm_min()), 2.0f};
    Bracket b = guess(total - target, whole);
    Selection s = list(b);
    // Where the guess was wrong, the other side of it is right.
    if (s.mass_above >= target) {
      b = {b.high, whole.high};
      s = list(b);
    } else if (s.mass_above + listed_mass(s.count) < target) {
      b = {whole.low, b.low};
      s = list(b);
    }
    double above = s.mass_above;
    while (s.count > kSortable && bits(b.high) - bits(b.low) > 1) {
      s = narrow(&b, s.count, target - above);
      above += s.mass_above;
    }

    int32_t* indices = scratch_.indices();
    // In the order of the definition; equal weights may still be different logits.
    const auto before = [this](int32_t i, int32_t j) {
      const float a = tempered(logits_[token_at(i)]), b = tempered(logits_[token_at(j)]);
      return a > b || (a == b && i < j);
    };
    if (!std::is_sorted(indices, indices + s.count, before)) {
      std::sort(indices, indices + s.count, before);
    }
    for (int64_t i = 0; i < s.count; ++i) {
      float& weight = weights()[indices[i]];
      if (above < target) {
        above += weight;
      } else {
        weight = 0;
      }
    }
    return b.low;
  }

  // Where the threshold of top-p is likely to be: what is below it adds up to `tail`, and one
  // weight in 16 tells about where that is. The bracket ends where the estimate is three standard
  // deviations away, counting as seen one more weight of the size in question.
  Bracket guess(double tail, const Bracket& whole) const {
    constexpr int kShift = 19, kNumBins = 0x40000000 >> kShift;  // 16 bins for each power of two
    constexpr int kStride = 128, kTaken = kStride / 16;
    if (size_ < 64 * kStride) return whole;
    float bins[kNumBins];
    // What is too small to matter is spread over the lowest bins, lest each addition wait for the
    // one before.
    const int first = std::max(0, (bits(whole.low) >> kShift) - kTaken);
    std::fill(bins + first, bins + kNumBins, 0.0f);
    for (int64_t begin = 0; begin + kTaken <= size_; begin += kStride) {
      for (int i = 0; i < kTaken; ++i) {
        const float weight = weights()[begin + i];
        bins[std::max(first + i, bits(weight) >> kShift)] += weight;
      }
    }
    Bracket b = whole;
    double below = 0, variance = 0;
    for (int bin = first; bin < kNumBins; ++bin) {
      const float edge = from_bits((bin + 1) << kShift);
      below += 16 * bins[bin];
      variance += 256 * bins[bin] * edge;
      const double away = below - tail;
      if (away * away < 9 * (variance + 256 * edge * edge)) continue;
      if (away > 0) {
        b.high = edge;
        break;
      }
      b.low = edge;
    }
    return b;
  }

  // Makes the bracket an eighth as wide, and keeps of the list what it holds then. `target` is what
  // the list has to contribute.
  Selection narrow(Bracket* b, int64_t count, double target) const {
    const int64_t width = bits(b->high) - bits(b->low);
    float edges[kPivots + 2];
    for (int i = 0; i < kPivots + 2; ++i) {
      edges[i] = from_bits(static_cast<int32_t>(bits(b->low) + width * i / (kPivots + 1)));
    }
    float* listed = scratch_.listed();
    std::fill(listed + count, listed + padded(count), 0.0f);
    double masses[kPivots];  // of what reaches edges[1], edges[2], ...
    passes_.pivot_masses(listed, padded(count), edges + 1, masses);
    int i = 0;
    while (i < kPivots && masses[i] >= target) ++i;
    *b = {edges[i], edges[i + 1]};
    return passes_.select(listed, scratch_.indices(), padded(count), b->low, b->high, listed,
                          scratch_.indices());
  }

  // The first token whose cumulative mass exceeds `uniform` times the mass of all that is kept.
  int64_t draw(float threshold, double uniform) const {
    double* masses = scratch_.masses.get();
    passes_.chunk_masses(weights(), padded(size_), threshold, masses);
    const double target = uniform * std::accumulate(masses, masses + num_chunks(size_), 0.0);
    double cumulative = 0;
    int64_t chunk = 0;
    while (chunk + 1 < num_chunks(size_) && cumulative + masses[chunk] <= target) {
      cumulative += masses[chunk++];
    }
    const auto kept = [&](int64_t i) { return weights()[i] >= threshold ? weights()[i] : 0.0f; };
    int64_t i = chunk * kChunk;
    const int64_t end = std::min(size_, i + kChunk);
    for (; i < end; ++i) {
      cumulative += kept(i);
      if (cumulative > target) return token_at(i);
    }
    // Added up one by one, a chunk may come out a little smaller than its mass: then its last.
    do --i;
    while (i > 0 && !(kept(i) > 0));
    return token_at(i);
  }

  static constexpr int64_t kSortable = 8;

  static int64_t padded(int64_t size) { return (size + kBlock - 1) / kBlock * kBlock; }

  static int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }

  // Floats that are not negative order as their bits do.
  static int32_t bits(float value) { return std::bit_cast<int32_t>(value); }
  static float from_bits(int32_t value) { return std::bit_cast<float>(value); }

  const RowPasses& passes_;
  const SampleScratch& scratch_;
  int64_t vocab_size_;
  const float* logits_;
  float largest_, temperature_;

  // The weights to draw from are those of the whole row, or of the tokens that `tokens_` lists.
  int64_t size_;
  const int32_t* tokens_;
};

}  // namespace convai_fast
