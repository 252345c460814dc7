// One row of logits on the GPU, shared out over the threads that sample from it, and the two
// searches that sampling consists of: `select`, in the order of decreasing probability, and
// `locate`, in the order of the vocabulary. Nothing is sorted.
//
// Every sum is one of integers (see `mass`), so that the token drawn is the same whatever the
// number of threads, blocks or rows: no order of summation can change it.
#pragma once

#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cooperative_groups/scan.h>

#include <cmath>
#include <cstdint>

#include "ops/sample/cuda_team.cuh"

namespace convai_fast::sample {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
constexpr int kBins = kThreads, kLogBins = 10;  // a thread a bin

// A token's *gap*, (largest logit - its logit) / temperature, is what its probability is below the
// largest, as a power of e. Its *key*, the bits of the gap, orders tokens as the gap does, since
// non-negative floats order like their bits: the likeliest token has key 0.
//
// Its *mass* is exp(-gap), rounded to units of 2^-40. From a gap of 28 on (2^-40.4) a token has no
// mass and is never drawn; 50,000 such tokens together should be, once in 3e7 draws. The mass of a
// row is at least the 2^40 of its largest logit, and fits 64 bits for vocabularies below 2^24.
constexpr int kMasslessGap = 28;
constexpr uint32_t kMasslessKey = 0x41e00000;  // the bits of 28.0f

__device__ inline uint64_t mass(uint32_t key) {
  return key < kMasslessKey ? __float2ull_rn(expf(-__uint_as_float(key)) * 0x1p40f) : 0;
}

// The last key that `select` takes, the weight of all smaller keys, and that of the key itself.
struct Selected {
  uint32_t key;
  uint64_t before, weight;
};

// A block's shared memory, beside its slice of the row.
struct BlockScratch {
  uint32_t low[kBins], high[kBins];  // the halves of a histogram's 64-bit weights
  uint64_t sums[kWarps];
  float largest[kWarps];
  Selected selected;
  int found;
};

// Each warp of each block owns `span` tokens in a row, of which its lanes take every 32nd, so that
// reads are coalesced and free of bank conflicts. A thread is alone in touching what it owns, but
// for the end of `locate`.
//
// With kInShared the row is read once from global memory and its gaps are kept in `slice`, one
// float for each token of the block; otherwise every pass reads the logits again.
template <typename Logit, bool kInShared>
class TeamRow {
 public:
  __device__ TeamRow(const Logit* logits, int64_t stride, int vocab_size, BlockScratch& scratch,
                     float* slice)
      : logits_(logits),
        stride_(stride),
        vocab_size_(vocab_size),
        scratch_(scratch),
        slice_(slice),
        span_(span(vocab_size, Team::size())),
        first_(Team::rank() * kWarps * span_),
        begin_(min(first_ + warp() * span_, vocab_size)),
        end_(min(begin_ + span_, vocab_size)) {}

  // How many tokens a warp owns: a multiple of 32, its lanes.
  __host__ __device__ static int span(int vocab_size, int num_blocks) {
    const int num_lanes = num_blocks * kThreads;
    return (vocab_size + num_lanes - 1) / num_lanes * 32;
  }

  __device__ int vocab_size() const { return vocab_size_; }
  __device__ float logit(int i) const { return static_cast<float>(logits_[i * stride_]); }

  // Reads the row and returns its largest logit, or NaN if there is one. To be called first.
  __device__ float read() {
    constexpr int kBatch = 32 / sizeof(Logit);  // loads that a thread has under way: 32 bytes
    const auto larger = [](float a, float b) { return a > b || a != a ? a : b; };
    float largest = -INFINITY;
    for (int i = begin_ + lane(); i < end_; i += 32 * kBatch) {
      float batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) batch[j] = i + 32 * j < end_ ? logit(i + 32 * j) : -INFINITY;
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        largest = larger(batch[j], largest);
        if (kInShared && i + 32 * j < end_) slice_[i + 32 * j - first_] = batch[j];
      }
    }
    largest = cg::reduce(tile(), largest, larger);
    if (lane() == 0) scratch_.largest[warp()] = largest;
    Team::sync();
    for (int rank = 0; rank < Team::size(); ++rank) {
      largest = larger(Team::peer(scratch_.largest, rank)[lane()], largest);
    }
    largest_ = cg::reduce(tile(), largest, larger);
    return largest_;
  }

  // Fixes the temperature, before any search. Returns the mass of the row at temperature 1 if it is
  // asked for.
  __device__ uint64_t temper(float temperature, bool want_mass) {
    temperature_ = temperature;
    if (!kInShared && !want_mass) return 0;
    uint64_t sum = 0;
#pragma unroll 4
    for (int i = begin_ + lane(); i < end_; i += 32) {
      const float x = kInShared ? slice_[i - first_] : logit(i);
      if (want_mass) sum += mass(__float_as_uint(largest_ - x));
      if (kInShared) slice_[i - first_] = gap(x);
    }
    if (!want_mass) return 0;
    put_sum(sum);
    Team::sync();
    const uint64_t total = sums(0, Team::size()).total;
    Team::sync();  // before the sums are written again
    return total;
  }

  // In the order of increasing keys, the one at which the weight so far reaches `target(total)`,
  // from 1 to the total weight. `weigh(key)` gives the weight of a token; keys from `end` on have
  // none. With weights of 1 and a target of 3, keys 5 7 7 7 9 give {.key=7, .before=1, .weight=3}.
  //
  // A histogram narrows the keys to those of one bin, and the next one spreads that bin's keys over
  // all bins, until a bin is a single key. The first has bins of 1/32 in the gap, so that logits
  // spread over many of them; then some 2^16 keys are left, which two more histograms resolve.
  template <typename Weigh, typename Target>
  __device__ Selected select(uint32_t end, Weigh weigh, Target target_of) {
    const int thread = threadIdx.x;
    uint32_t begin = 0;
    uint64_t before = 0, target = 0;
    for (bool first = true;; first = false) {
      const uint32_t width = end - begin;
      const int shift = max(0, 32 - __clz(width - 1) - kLogBins);  // (width - 1) >> shift < kBins
      scratch_.low[thread] = scratch_.high[thread] = 0;
      __syncthreads();
      for_each([&](int, uint32_t key) {
        if (key - begin < width) {
          add_to_bin(
              first ? static_cast<int>(__uint_as_float(key) * kFirstBins) : (key - begin) >> shift,
              weigh(key));
        }
      });
      Team::sync();
      uint64_t weight = 0;
      for (int rank = 0; rank < Team::size(); ++rank) {
        const BlockScratch& peer = *Team::peer(&scratch_, rank);
        weight += peer.low[thread] + (static_cast<uint64_t>(peer.high[thread]) << 32);
      }
      uint64_t until = cg::inclusive_scan(tile(), weight, cg::plus<uint64_t>());
      if (lane() == 31) scratch_.sums[warp()] = until;
      __syncthreads();
      const Sums of_warps = sums(Team::rank(), Team::rank() + 1);
      if (first) target = target_of(of_warps.total);
      until += before + of_warps.before;
      if (until - weight < target && target <= until) {
        scratch_.selected = {static_cast<uint32_t>(thread), until - weight, weight};
      }
      Team::sync();
      const Selected bin = scratch_.selected;
      before = bin.before;
      if (first) {
        begin = __float_as_uint(static_cast<float>(bin.key) / kFirstBins);
        end = min(end, __float_as_uint(static_cast<float>(bin.key + 1) / kFirstBins));
      } else {
        begin += bin.key << shift;
        end = min(end, begin + (1u << shift));
      }
      if (end - begin == 1) return {begin, bin.before, bin.weight};
    }
  }

  // The first token, in the order of the vocabulary, with which the weight so far exceeds
  // `threshold(total)`, which is below the total weight; `weigh(i, key)` gives that of token i.
  template <typename Weigh, typename Threshold>
  __device__ int locate(Weigh weigh, Threshold threshold_of) {
    const auto plus = cg::plus<uint64_t>();
    uint64_t own = 0;
    for_each([&](int i, uint32_t key) { own += weigh(i, key); });
    own = put_sum(own);
    Team::sync();
    const Sums of_warps = sums(0, Team::size());
    const uint64_t threshold = threshold_of(of_warps.total), before = of_warps.before;

    if (before <= threshold && threshold < before + own) {  // true of one warp
      // Each lane weighs a run of the warp's tokens, of odd length so that their banks differ; ...
      const int length = (span_ / 32) | 1;
      const int run = min(begin_ + lane() * length, end_), run_end = min(run + length, end_);
      uint64_t sum = 0;
#pragma unroll 4
      for (int i = run; i < run_end; ++i) sum += weigh(i, key(i));
      const uint64_t until = before + cg::inclusive_scan(tile(), sum, plus);
      const int lane_of_run = __ffs(tile().ballot(until > threshold)) - 1;
      // ... then the run that holds the token is searched, a token a lane.
      uint64_t so_far = tile().shfl(until - sum, lane_of_run);
      for (int i = tile().shfl(run, lane_of_run) + lane();; i += 32) {
        const uint64_t weight = i < end_ ? weigh(i, key(i)) : 0;
        const uint64_t until_i = so_far + cg::inclusive_scan(tile(), weight, plus);
        const unsigned exceeding = tile().ballot(until_i > threshold);
        if (exceeding != 0) {
          if (lane() == __ffs(exceeding) - 1) {
            for (int rank = 0; rank < Team::size(); ++rank) *Team::peer(&scratch_.found, rank) = i;
          }
          break;
        }
        so_far = tile().shfl(until_i, 31);
      }
    }
    Team::sync();
    return scratch_.found;
  }

 private:
  static constexpr int kFirstBins = 32;  // a unit of the gap, in the first histogram of `select`
  static_assert(kMasslessGap * kFirstBins <= kBins && kBins == 1 << kLogBins);

  struct Sums {
    uint64_t before, total;
  };

  __device__ static cg::thread_block_tile<32> tile() {
    return cg::tiled_partition<32>(cg::this_thread_block());
  }
  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  // Rounded as on the CPU, also if the compiler may approximate divisions.
  __device__ float gap(float x) const { return __fdiv_rn(largest_ - x, temperature_); }

  __device__ uint32_t key(int i) const {
    return __float_as_uint(kInShared ? slice_[i - first_] : gap(logit(i)));
  }

  template <typename F>
  __device__ void for_each(F f) const {
#pragma unroll 4
    for (int i = begin_ + lane(); i < end_; i += 32) f(i, key(i));
  }

  // A 64-bit addition from two of 32 bits, which shared memory does natively: the second one is
  // needed only for a mass of 2^32 or more, exp(-5.5), and where the lower half wraps around.
  __device__ void add_to_bin(int bin, uint64_t weight) {
    const uint32_t low = static_cast<uint32_t>(weight);
    const uint32_t old = atomicAdd(&scratch_.low[bin], low);
    const uint32_t high = static_cast<uint32_t>(weight >> 32) + (old + low < old);
    if (high != 0) atomicAdd(&scratch_.high[bin], high);
  }

  __device__ uint64_t put_sum(uint64_t of_thread) {
    const uint64_t of_warp = cg::reduce(tile(), of_thread, cg::plus<uint64_t>());
    if (lane() == 0) scratch_.sums[warp()] = of_warp;
    return of_warp;
  }

  // The sums of all warps of the given blocks, and of those of them that come before this warp.
  __device__ Sums sums(int first_rank, int end_rank) const {
    Sums result{0, 0};
    for (int rank = first_rank; rank < end_rank; ++rank) {
      const uint64_t sum = Team::peer(scratch_.sums, rank)[lane()];
      result.total += sum;
      if (rank * kWarps + lane() < Team::rank() * kWarps + warp()) result.before += sum;
    }
    return {cg::reduce(tile(), result.before, cg::plus<uint64_t>()),
            cg::reduce(tile(), result.total, cg::plus<uint64_t>())};
  }

  const Logit* logits_;
  int64_t stride_;
  int vocab_size_;
  BlockScratch& scratch_;
  float* slice_;
  int span_, first_, begin_, end_;  // the block's first token; the warp's first and last + 1
  float largest_ = 0, temperature_ = 1;
};

}  // namespace convai_fast::sample
