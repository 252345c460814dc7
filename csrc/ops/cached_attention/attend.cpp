#include "ops/cached_attention/attend.h"

#include <ATen/Parallel.h>

#include <atomic>

#include "ops/scratch.h"

#define CONVAI_FAST_KERNEL "ops/cached_attention/cpu_kernel.h"
#include "simd/each_isa.h"

namespace convai_fast::cached_attention {
namespace {

// Kept by a thread for its next heads.
template <typename Kept>
Scratch<Kept> scratch_of_this_thread(const Arguments<Kept>& a) {
  using Activation = typename Scratch<Kept>::Activation;
  static thread_local std::vector<Kept> rounded;
  static thread_local std::vector<float> scores;
  static thread_local std::vector<Activation> queries, weights;
  return {at_least(rounded, a.value_blocks() * kBlock),
          at_least(queries, kMostQueries * a.padded_dim()),
          at_least(scores, std::max(kMostQueries * a.capacity, a.head_dim())),
          at_least(weights, kMostQueries * a.capacity)};
}

}  // namespace

template <typename Kept>
void attend(const Arguments<Kept>& arguments, const std::vector<Run>& runs) {
  const auto kernel = CONVAI_FAST_DISPATCH(cached_attention_kernel<Kept>);
  const int64_t num_heads = arguments.num_kv_heads;
  const int64_t tasks = static_cast<int64_t>(runs.size()) * num_heads;
  // Runs differ in length, so that threads take some tasks at a time; and they take them early, as
  // the keys of the next one are fetched from memory meanwhile.
  const int64_t threads = std::min<int64_t>(tasks, at::get_num_threads());
  const int64_t together = std::clamp<int64_t>(tasks / (8 * std::max<int64_t>(1, threads)), 1, 4);
  const auto keys_of = [&](int64_t task) {
    return arguments.keys_of(runs[task / num_heads].slot, task % num_heads);
  };
  std::atomic<int64_t> taken{0};
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const auto scratch = scratch_of_this_thread(arguments);
    for (int64_t first = taken.fetch_add(together), next; first < tasks; first = next) {
      next = taken.fetch_add(together);
      const int64_t last = std::min(tasks, first + together) - 1;
      for (int64_t task = first; task <= last; ++task) {
        const int64_t following = std::min(task < last ? task + 1 : next, tasks - 1);
        kernel(arguments, runs[task / num_heads], task % num_heads, keys_of(following), scratch);
      }
    }
  });
}

template void attend(const Arguments<float>&, const std::vector<Run>&);
template void attend(const Arguments<simd::BFloat16>&, const std::vector<Run>&);

}  // namespace convai_fast::cached_attention
