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

#include "ops/sample/cuda_logits.cuh"

namespace convai_fast::sample {

constexpr int kBins = 2 * kThreads, kLogBins = 10;  // two neighbours a thread

// A token's *gap*, (largest logit - its logit) / temperature, is what its probability is below the
// largest, as a power of e. Its *key*, the bits of the gap, orders tokens as the gap does, since
// non-negative floats order like their bits: the likeliest token has key 0.
//
// Its *mass* is exp(-gap), rounded down to units of 2^-40. From a gap of 28 on (2^-40.4) a token
// has no mass and is never drawn; 50,000 such tokens together should be, once in 3e7 draws. The
// mass of a row is at least the 2^40 of its largest logit, and fits 64 bits for vocabularies below
// 2^24.
constexpr int kMasslessGap = 28;
constexpr uint32_t kMasslessKey = 0x41e00000;  // the bits of 28.0f

__device__ inline uint64_t mass(uint32_t key) {
  if (key >= kMasslessKey) return 0;
  // Shifts take fewer cycles than a conversion to 64 bits: with a mantissa of 24 bits the float is
  // mantissa * 2^(exponent - 150), from 2^-40.4 to 1.
  const uint32_t bits = __float_as_uint(exp2f(__uint_as_float(key) * -1.44269504f));
  const uint64_t mantissa = (bits & 0x7fffff) | 0x800000;
  return mantissa << 24 >> (134 - (bits >> 23));
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

template <typename Logit, bool kInShared>
class TeamRow {
  using Logits = TeamLogits<Logit, kInShared>;

 public:
  __device__ TeamRow(const Logits& logits, BlockScratch& scratch)
      : logits_(logits), scratch_(scratch) {}

  __device__ int vocab_size() const { return logits_.vocab_size(); }

  // Reads the row and returns its largest logit, or NaN if there is one. To be called first.
  __device__ float read() {
    const auto larger = Logits::larger;
    float largest = cg::reduce(tile(), logits_.read(), larger);
    if (lane() == 0) scratch_.largest[warp()] = largest;
    Team::sync();
    for (int rank = 0; rank < Team::size(); ++rank) {
      if (lane() < kWarps) largest = larger(Team::peer(scratch_.largest, rank)[lane()], largest);
    }
    largest_ = cg::reduce(tile(), largest, larger);
    return largest_;
  }

  // The mass of the row at temperature 1.
  __device__ uint64_t unfiltered_mass() {
    uint64_t sum = 0;
    logits_.for_each(-INFINITY, [&](int, float x) { sum += mass(__float_as_uint(largest_ - x)); });
    put_sum(sum);
    Team::sync();
    const uint64_t total = sums(0, Team::size()).total;
    Team::sync();  // before the sums are written again
    return total;
  }

  // To be called before any search. A temperature beyond 2^-60 or 2^60 is taken for that one, so
  // that no step of a division leaves the range of floats.
  __device__ void set_temperature(float temperature) {
    temperature_ = fminf(fmaxf(temperature, 0x1p-60f), 0x1p60f);
    reciprocal_ = __fdiv_rn(1.0f, temperature_);
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
    const int even = 2 * threadIdx.x, odd = even + 1;
    uint32_t begin = 0;
    uint64_t before = 0, target = 0;
    for (bool first = true;; first = false) {
      const uint32_t width = end - begin;
      const int shift = max(0, 32 - __clz(width - 1) - kLogBins);  // (width - 1) >> shift < kBins
      scratch_.low[even] = scratch_.low[odd] = scratch_.high[even] = scratch_.high[odd] = 0;
      __syncthreads();
      // In flat rows a lane's tokens fall into one bin, to which they are added together.
      int bin = 0;
      uint64_t pending = 0;
      logits_.for_each(lowest_below(end), [&](int, float x) {
        const uint32_t key = this->key(x);
        if (key - begin >= width) return;
        const int next = first ? first_bin(key) : (key - begin) >> shift;
        if (next != bin) {
          add_to_bin(bin, pending);
          bin = next;
          pending = 0;
        }
        pending += weigh(key);
      });
      if (tile().all(bin == tile().shfl(bin, 0))) {  // or those of a whole warp
        pending = cg::reduce(tile(), pending, cg::plus<uint64_t>());
        if (lane() != 0) pending = 0;
      }
      add_to_bin(bin, pending);
      Team::sync();
      uint64_t of_even = 0, of_odd = 0;
      for (int rank = 0; rank < Team::size(); ++rank) {
        const BlockScratch& peer = *Team::peer(&scratch_, rank);
        of_even += peer.low[even] + (static_cast<uint64_t>(peer.high[even]) << 32);
        of_odd += peer.low[odd] + (static_cast<uint64_t>(peer.high[odd]) << 32);
      }
      uint64_t until = cg::inclusive_scan(tile(), of_even + of_odd, cg::plus<uint64_t>());
      if (lane() == 31) scratch_.sums[warp()] = until;
      __syncthreads();
      const Sums of_warps = sums(Team::rank(), Team::rank() + 1);
      if (first) target = target_of(of_warps.total);
      until += before + of_warps.before;
      const uint64_t middle = until - of_odd, from = middle - of_even;
      if (from < target && target <= middle) {
        scratch_.selected = {static_cast<uint32_t>(even), from, of_even};
      } else if (middle < target && target <= until) {
        scratch_.selected = {static_cast<uint32_t>(odd), middle, of_odd};
      }
      Team::sync();
      const Selected selected = scratch_.selected;
      before = selected.before;
      if (first) {
        begin = __float_as_uint(static_cast<float>(selected.key) / kFirstBins);
        end = min(end, __float_as_uint(static_cast<float>(selected.key + 1) / kFirstBins));
      } else {
        begin += selected.key << shift;
        end = min(end, begin + (1u << shift));
      }
      if (end - begin == 1) return {begin, selected.before, selected.weight};
    }
  }

  // The first token, in the order of the vocabulary, with which the weight so far exceeds
  // `threshold(total)`, which is below the total weight; `weigh(i, key)` gives that of token i.
  // Keys from `end` on have none.
  template <typename Weigh, typename Threshold>
  __device__ int locate(uint32_t end, Weigh weigh, Threshold threshold_of) {
    const float lowest = lowest_below(end);
    uint64_t own = 0;
    logits_.for_each(lowest, [&](int i, float x) { own += weigh(i, key(x)); });
    own = put_sum(own);
    Team::sync();
    const Sums of_warps = sums(0, Team::size());
    const uint64_t threshold = threshold_of(of_warps.total);
    uint64_t so_far = of_warps.before;
    if (so_far <= threshold && threshold < so_far + own) {  // true of one warp
      for (int place = logits_.first_place();; place += Logits::kStep) {
        uint64_t of_vector = 0;
        logits_.for_each_of(place, lowest, [&](int i, float x) { of_vector += weigh(i, key(x)); });
        uint64_t until = so_far + cg::inclusive_scan(tile(), of_vector, cg::plus<uint64_t>());
        const unsigned exceeding = tile().ballot(until > threshold);
        so_far = tile().shfl(until, 31);
        if (exceeding == 0) continue;
        if (lane() == __ffs(exceeding) - 1) {
          until -= of_vector;
          int found = -1;
          logits_.for_each_of(place, lowest, [&](int i, float x) {
            until += weigh(i, key(x));
            if (found < 0 && until > threshold) found = i;
          });
          for (int rank = 0; rank < Team::size(); ++rank)
            *Team::peer(&scratch_.found, rank) = found;
        }
        break;
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

  // The quotient rounded as on the CPU, with the correction that a division ends with; for -inf not
  // a number, whose bits are no key with mass either.
  __device__ uint32_t key(float x) const {
    const float below = largest_ - x, quotient = below * reciprocal_;
    const float rest = fmaf(-quotient, temperature_, below);
    return __float_as_uint(fmaf(rest, reciprocal_, quotient));
  }

  // A bound on the logits whose keys are below `end`: most are told apart without their key.
  __device__ float lowest_below(uint32_t end) const {
    const float gap = __fmul_ru(__uint_as_float(end), temperature_);
    return __fsub_rd(largest_, __fmul_ru(gap, 1 + 0x1p-20f));
  }

  // gap * kFirstBins, rounded down: the last bits of a sum without bits behind the point.
  __device__ static int first_bin(uint32_t key) {
    const float sum = __fmaf_rz(__uint_as_float(key), kFirstBins, 0x1p23f);
    return __float_as_uint(sum) & (kBins - 1);
  }

  // A 64-bit addition from two of 32 bits, which shared memory does natively: the second one is
  // needed only for a mass of 2^32 or more, exp(-5.5), and where the lower half wraps around.
  __device__ void add_to_bin(int bin, uint64_t weight) {
    if (weight == 0) return;
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
      const uint64_t sum = lane() < kWarps ? Team::peer(scratch_.sums, rank)[lane()] : 0;
      result.total += sum;
      if (rank * kWarps + lane() < Team::rank() * kWarps + warp()) result.before += sum;
    }
    return {cg::reduce(tile(), result.before, cg::plus<uint64_t>()),
            cg::reduce(tile(), result.total, cg::plus<uint64_t>())};
  }

  Logits logits_;
  BlockScratch& scratch_;
  float largest_ = 0, temperature_ = 1, reciprocal_ = 1;
};

}  // namespace convai_fast::sample
