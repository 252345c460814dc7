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

#include "ops/sample/cuda_histogram.cuh"
#include "ops/sample/cuda_logits.cuh"
#include "ops/sample/cuda_mass.cuh"

namespace convai_fast::sample {

// The last key that `select` takes, the weight of all smaller keys, and that of the key itself.
struct Selected {
  uint32_t key;
  uint64_t before, weight;
};

// A block's shared memory, beside its slice of the row.
struct BlockScratch {
  Histogram histogram;
  uint64_t sums[kWarps];
  float largest[kWarps];
  Selected selected;
  int found;
};

// What a team does with its row.
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
    logits_.for_each(largest_ - kMasslessGap, [&](int, const float (&x)[kVector]) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum += mass(__float_as_uint(largest_ - x[j]));
    });
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
      scratch_.histogram.clear(even);
      scratch_.histogram.clear(odd);
      __syncthreads();
      if (first) {
        fill_bins(0, end, weigh, first_bin);
      } else {
        fill_bins(begin, end, weigh, [&](uint32_t key) { return (key - begin) >> shift; });
      }
      Team::sync();
      uint64_t of_even = 0, of_odd = 0;
      for (int rank = 0; rank < Team::size(); ++rank) {
        const Histogram& peer = *Team::peer(&scratch_.histogram, rank);
        of_even += peer.weight(even);
        of_odd += peer.weight(odd);
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
    const auto weigh_at = [&](int place, float x) { return weigh(logits_.token(place), key(x)); };
    uint64_t own = 0;
    logits_.for_each(lowest, [&](int place, const float (&x)[kVector]) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) own += weigh_at(place + j, x[j]);
    });
    own = put_sum(own);
    Team::sync();
    const Sums of_warps = sums(0, Team::size());
    const uint64_t threshold = threshold_of(of_warps.total);
    uint64_t so_far = of_warps.before;
    if (so_far <= threshold && threshold < so_far + own) {  // true of one warp
      for (int place = logits_.first_place();; place += Logits::kStep) {
        const auto values = logits_.values(place, lowest);
        uint64_t of_vector = 0;
        if (values.any) {
#pragma unroll
          for (int j = 0; j < kVector; ++j) of_vector += weigh_at(place + j, values.x[j]);
        }
        uint64_t until = so_far + cg::inclusive_scan(tile(), of_vector, cg::plus<uint64_t>());
        const unsigned exceeding = tile().ballot(until > threshold);
        so_far = tile().shfl(until, 31);
        if (exceeding == 0) continue;
        if (lane() == __ffs(exceeding) - 1) {
          int found = 0;  // in the vector: from its end on, the first token to exceed
#pragma unroll
          for (int j = kVector - 1; j >= 0; --j) {
            if (until > threshold) found = j;
            until -= weigh_at(place + j, values.x[j]);
          }
          found = logits_.token(place + found);
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
  static constexpr int kVector = Logits::kVector;
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

  // Adds the tokens with keys from `begin` to below `end` to their bins.
  template <typename Weigh, typename BinOf>
  __device__ void fill_bins(uint32_t begin, uint32_t end, Weigh weigh, BinOf bin_of) {
    using Weight = decltype(weigh(begin));
    constexpr int kGroup = 4;  // tokens at a time: registers are few
    int last_bin = 0;
    Weight pending = 0;
    const auto add = [&](const float* x) {
      int bins[kGroup];
      Weight weights[kGroup], sum = 0;
      bool one_bin = true;
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const uint32_t key = this->key(x[j]), counted = min(max(key, begin), end - 1);
        bins[j] = bin_of(counted);
        weights[j] = key == counted ? weigh(counted) : 0;
        sum += weights[j];
        one_bin = one_bin && bins[j] == bins[0];
      }
      if (!one_bin) {
#pragma unroll
        for (int j = 0; j < kGroup; ++j) scratch_.histogram.add(bins[j], weights[j]);
        return;
      }
      // In flat rows most are alike, and additions to one bin would wait for each other.
      if (bins[0] != last_bin) {
        scratch_.histogram.add(last_bin, pending);
        last_bin = bins[0];
        pending = 0;
      }
      pending += sum;
    };
    logits_.for_each(lowest_below(end), [&](int, const float (&x)[kVector]) {
#pragma unroll
      for (int j = 0; j < kVector; j += kGroup) add(x + j);
    });
    if (tile().all(last_bin == tile().shfl(last_bin, 0))) {
      pending = cg::reduce(tile(), pending, cg::plus<Weight>());
      if (lane() != 0) pending = 0;
    }
    scratch_.histogram.add(last_bin, pending);
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
