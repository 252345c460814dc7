// The logits of one row on the GPU, shared out over the threads that sample from it.
#pragma once

#include <cmath>
#include <cstdint>

#include "ops/sample/cuda_team.cuh"

namespace convai_fast::sample {

// Two blocks share an SM, so that one computes while the other waits for its row.
constexpr int kThreads = 512, kWarps = kThreads / 32, kBlocksAnSm = 2;

// Each warp of each block owns `span` tokens in a row, which its lanes take in turns, as many at a
// time as 16 bytes hold: a *vector*. A thread is alone in touching what it owns, but for the end of
// `locate`.
//
// Vectors lie where memory is a multiple of 16 bytes, wherever the row begins. So token i is at
// *place* i + skew; places around the row hold -inf, which has no mass.
//
// With kInShared the row is read once from global memory and kept in `slice`, which has a logit for
// each place of the block; otherwise every pass reads the logits again.
template <typename Logit, bool kInShared>
class TeamLogits {
 public:
  static constexpr int kVector = 16 / sizeof(Logit), kStep = 32 * kVector;  // of a lane, a warp

  __device__ TeamLogits(const Logit* logits, int64_t stride, int vocab_size, Logit* slice)
      : logits_(logits),
        stride_(stride),
        vocab_size_(vocab_size),
        skew_(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(Logit)),
        slice_(slice),
        first_(Team::rank() * kWarps * span(vocab_size, Team::size())),
        begin_(min(first_ + warp() * span(vocab_size, Team::size()), skew_ + vocab_size)),
        end_(min(begin_ + span(vocab_size, Team::size()), skew_ + vocab_size)) {}

  // How much memory `slice` needs.
  __host__ __device__ static int64_t slice_bytes(int vocab_size, int num_blocks) {
    const int64_t all = (places(vocab_size) + kVector - 1) / kVector * kVector;
    const int64_t of_block = int64_t{kWarps} * span(vocab_size, num_blocks);
    return (all < of_block ? all : of_block) * sizeof(Logit);
  }

  __device__ int vocab_size() const { return vocab_size_; }
  __device__ float logit(int i) const { return static_cast<float>(logits_[i * stride_]); }

  // Reads the warp's part and returns the largest of what the thread has read, or NaN if there is
  // one. To be called first.
  __device__ float read() {
    constexpr int kBatch = 4;  // loads that a thread has under way
    float largest = -INFINITY;
    for (int place = first_place(); place < end_; place += kBatch * kStep) {
      Vector batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (place + j * kStep < end_) batch[j] = fetch(place + j * kStep);
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        if (place + j * kStep >= end_) break;
        if (kInShared) kept(place + j * kStep) = batch[j];
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          largest = larger(static_cast<float>(batch[j].logits[k]), largest);
        }
      }
    }
    return largest;
  }

  __device__ static float larger(float a, float b) { return a > b || a != a ? a : b; }

  // The logits at a vector of places, and whether one of them is at least `lowest`.
  struct Values {
    float x[kVector];
    bool any;
  };
  __device__ Values values(int place, float lowest) const {
    Values result;
    if (place >= end_) return {.x = {}, .any = false};
    const Vector vector = kInShared ? kept(place) : fetch(place);
    float largest = -INFINITY;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      result.x[j] = static_cast<float>(vector.logits[j]);
      largest = fmaxf(largest, result.x[j]);
    }
    result.any = largest >= lowest;
    return result;
  }

  // The token at a place.
  __device__ int token(int place) const { return place - skew_; }

  // Calls f(place, values) for the vectors that hold a logit of at least `lowest`.
  template <typename F>
  __device__ void for_each(float lowest, F f) const {
    for (int place = first_place(); place < end_; place += kStep) {
      const Values v = values(place, lowest);
      if (v.any) f(place, v.x);
    }
  }

  // The lane's first vector in its warp.
  __device__ int first_place() const { return begin_ + lane() * kVector; }

 private:
  struct alignas(16) Vector {
    Logit logits[kVector];
  };

  // How many places there are at most.
  __host__ __device__ static int places(int vocab_size) { return vocab_size + kVector - 1; }

  // How many places a warp owns.
  __host__ __device__ static int span(int vocab_size, int num_blocks) {
    const int step_of_team = num_blocks * kWarps * kStep;
    return (places(vocab_size) + step_of_team - 1) / step_of_team * kStep;
  }

  __device__ Vector& kept(int place) const {
    return *reinterpret_cast<Vector*>(slice_ + (place - first_));
  }

  // From global memory.
  __device__ Vector fetch(int place) const {
    const int i = place - skew_;
    if (stride_ == 1 && i >= 0 && i + kVector <= vocab_size_) {
      return *reinterpret_cast<const Vector*>(logits_ + i);
    }
    Vector result;
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      const bool is_token = i + j >= 0 && i + j < vocab_size_;
      result.logits[j] = is_token ? logits_[(i + j) * stride_] : static_cast<Logit>(-INFINITY);
    }
    return result;
  }

  const Logit* logits_;
  int64_t stride_;
  int vocab_size_, skew_;
  Logit* slice_;
  int first_, begin_, end_;  // the block's first place; the warp's first and last + 1
};

}  // namespace convai_fast::sample
