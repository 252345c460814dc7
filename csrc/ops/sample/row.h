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

// Weights or logits, and where each comes from.
struct List {
  float* values;
  int32_t* places;

  List operator+(int64_t offset) const { return {values + offset, places + offset}; }
};

inline int64_t num_blocks(int64_t size) { return (size + kBlock - 1) / kBlock; }
inline int64_t num_chunks(int64_t size) { return (size + kChunk - 1) / kChunk; }
inline int64_t padded(int64_t size) { return num_blocks(size) * kBlock; }

// Fills a list's last block up with zeros.
inline void pad(float* list, int64_t count) { std::fill(list + count, list + padded(count), 0.0f); }

// Floats that are not negative order as their bits do.
inline int32_t bits(float value) { return std::bit_cast<int32_t>(value); }
inline float from_bits(int32_t value) { return std::bit_cast<float>(value); }

// What one row at a time needs beside the logits, for rows of up to `vocab_size`. Most of it is
// touched only where a filter leaves many tokens to choose from.
class Scratch {
 public:
  explicit Scratch(int64_t vocab_size)
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

}  // namespace convai_fast::sample
