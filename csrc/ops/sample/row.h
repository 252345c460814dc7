// What the CPU's `sample` works on: a row of logits, and lists of some of them.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <memory>

namespace convai_fast::sample {

constexpr int64_t kBlock = 64;   // logits that share a maximum; arrays are padded to whole blocks
constexpr int64_t kChunk = 512;  // weights added up in float32 before their sum goes into a double
constexpr int kPivots = 7;
constexpr int64_t kPerLine = 16;       // floats in a line of the cache
constexpr int64_t kFetchAhead = 2048;  // logits, 8 KB

// Logits to draw from. The weight of each is exp((logit - largest) / temperature).
struct Row {
  const float* logits;
  int64_t size;
  float largest, temperature;

  float tempered(float logit) const { return (logit - largest) / temperature; }
};

// An interval of weights, without its upper end.
struct Bracket {
  float low, high;
};

// Logits, and where each comes from.
struct List {
  float* values;
  int32_t* places;
};

inline int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }
inline int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }
inline int64_t padded(int64_t size) { return num_blocks(size) * kBlock; }

// Fills a list's last block up with zeros.
inline void pad(float* list, int64_t count) { std::fill(list + count, list + padded(count), 0.0f); }

// Floats that are not negative order as their bits do.
inline int32_t bits(float value) { return std::bit_cast<int32_t>(value); }
inline float from_bits(int32_t value) { return std::bit_cast<float>(value); }
inline float next_up(float value) { return from_bits(bits(value) + 1); }

// What one row at a time needs beside the logits, for rows of up to `vocab_size`. Most of it is
// touched only where a filter leaves many tokens to choose from.
class Scratch {
 public:
  explicit Scratch(int64_t vocab_size)
      : size_(padded(vocab_size) + kBlock),
        num_maxima_(padded(size_ / kBlock)),
        num_sums_(size_ / kChunk + 1),
        memory_(new CacheLine[(6 * size_ + 2 * num_maxima_ + 5 * num_sums_) / kPerLine + 1]) {}

  int64_t vocab_size() const { return size_ - kBlock; }

  float* logits() const { return floats(); }  // a row that has to be converted
  List kept() const {                         // what is left after top-k or min-p
    return {floats() + size_, reinterpret_cast<int32_t*>(floats() + 2 * size_)};
  }
  float* inside() const { return floats() + 3 * size_; }    // what the bracket of top-p holds
  float* narrowed() const { return floats() + 4 * size_; }  // the same of a narrower one
  int32_t* ties() const { return reinterpret_cast<int32_t*>(floats() + 5 * size_); }
  float* maxima() const { return floats() + 6 * size_; }
  float* ordered_maxima() const { return maxima() + num_maxima_; }
  // Of each chunk: its mass, that of what is kept of it, and how many of it are inside.
  double* totals() const { return reinterpret_cast<double*>(ordered_maxima() + num_maxima_); }
  double* above() const { return totals() + num_sums_; }
  int32_t* listed() const { return reinterpret_cast<int32_t*>(above() + num_sums_); }

 private:
  // So that no vector lies in two lines of the cache.
  struct alignas(64) CacheLine {
    float values[kPerLine];
  };

  float* floats() const { return reinterpret_cast<float*>(memory_.get()); }

  int64_t size_, num_maxima_, num_sums_;
  std::unique_ptr<CacheLine[]> memory_;
};

}  // namespace convai_fast::sample
