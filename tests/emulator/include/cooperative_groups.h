// Cooperative groups, as far as our kernels use them.
#pragma once

#include "cuda.h"

namespace cooperative_groups {

struct thread_block {};
inline thread_block this_thread_block() { return {}; }

template <int kSize>
class thread_block_tile {
 public:
  int thread_rank() const { return emulator::self().lane % kSize; }
  int size() const { return kSize; }
  void sync() const { __syncwarp(mask()); }

  template <typename T>
  T shfl(T x, int rank) const {
    return given(x)[first() + rank % kSize];
  }
  template <typename T>
  T shfl_xor(T x, int bits) const {
    return given(x)[emulator::self().lane ^ bits];
  }
  unsigned ballot(bool predicate) const { return __ballot_sync(mask(), predicate) >> first(); }
  bool any(bool predicate) const { return ballot(predicate) != 0; }
  bool all(bool predicate) const { return __all_sync(mask(), predicate); }
  template <typename T>
  unsigned match_any(T x) const {
    return __match_any_sync(mask(), x) >> first();
  }

  // Of the lanes up to and with the given rank, from the first on.
  template <typename T, typename F>
  T fold(T x, F f, int last_rank) const {
    const auto all = given(x);
    T result = all[first()];
    for (int rank = 1; rank <= last_rank; ++rank) result = f(result, all[first() + rank]);
    return result;
  }

 private:
  static_assert(32 % kSize == 0);
  int first() const { return emulator::self().lane / kSize * kSize; }
  uint32_t mask() const { return (~0u >> (32 - kSize)) << first(); }
  template <typename T>
  emulator::Given<T> given(T x) const {
    return emulator::exchange(mask(), x);
  }
};

template <int kSize>
thread_block_tile<kSize> tiled_partition(thread_block) {
  return {};
}

struct cluster_group {
  unsigned num_blocks() const { return emulator::cluster->launch.cluster_size; }
  unsigned block_rank() const { return emulator::self().block; }
  void sync() const { emulator::wait(emulator::cluster->barrier); }
  template <typename T>
  T* map_shared_rank(T* shared, int rank) const {
    return emulator::shared_of(shared, rank);
  }
};
inline cluster_group this_cluster() { return {}; }

template <typename T>
struct plus {
  T operator()(T a, T b) const { return a + b; }
};

}  // namespace cooperative_groups
