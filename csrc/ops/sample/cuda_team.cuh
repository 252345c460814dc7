// The thread blocks that share a row of logits on the GPU.
#pragma once

#include <cooperative_groups.h>

namespace convai_fast::sample {

namespace cg = cooperative_groups;

__device__ inline int lane() { return threadIdx.x % 32; }
__device__ inline int warp() { return threadIdx.x / 32; }
__device__ inline cg::thread_block_tile<32> tile() {
  return cg::tiled_partition<32>(cg::this_thread_block());
}

// A cluster (from sm_90 on), whose blocks reach into each other's shared memory, or a single block.
// A block must not end before its peers have read from it: `sync` comes last.
struct Team {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
  __device__ static int size() { return 1; }
  __device__ static int rank() { return 0; }
  __device__ static void sync() { __syncthreads(); }
  template <typename T>
  __device__ static T* peer(T* shared, int /*rank*/) {
    return shared;
  }
#else
  __device__ static int size() { return cg::this_cluster().num_blocks(); }
  __device__ static int rank() { return cg::this_cluster().block_rank(); }
  __device__ static void sync() {
    if (size() == 1) {
      __syncthreads();  // which waits for less
    } else {
      cg::this_cluster().sync();
    }
  }
  template <typename T>
  __device__ static T* peer(T* shared, int rank) {
    return cg::this_cluster().map_shared_rank(shared, rank);
  }
#endif
};

}  // namespace convai_fast::sample
