// A GPU on one CPU thread: each CUDA thread is a fiber, which runs until it has to wait for others.
// Who goes on then is up to a schedule, so that a missing barrier shows as a wrong result.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "fiber.h"

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

// Which of the threads that could go on does. But for kRandom each has a priority, drawn anew for
// each cluster, and the first one goes on as long as it can: the last is held back as long as the
// others find anything to do, be it a thread, a warp or a block.
enum class Schedule { kWarps, kThreads, kBlocks, kRandom };
constexpr int kSchedules = 4;

struct Launch {
  dim3 grid;
  unsigned cluster_size = 1;  // blocks, along x
  unsigned threads = 0;
  std::vector<size_t> shared_bytes;  // of each array or struct that a block has, see `shared`
  uint64_t seed = 0;                 // draws the schedule, the priorities and what memory holds
};

struct Barrier {
  int size = 0, arrived = 0;
  std::vector<int> waiting;  // ranks of threads
};

// Lanes of a warp that do something together. Two sets of slots: nobody is two exchanges ahead.
struct Group {
  uint32_t mask;
  Barrier barrier;
  int turn = 0;
  alignas(16) unsigned char slots[2][32][16];
};

struct Warp {
  std::vector<std::unique_ptr<Group>> groups;

  Group& group(uint32_t mask) {
    for (auto& group : groups) {
      if (group->mask == mask) return *group;
    }
    groups.push_back(std::make_unique<Group>());
    groups.back()->mask = mask;
    groups.back()->barrier.size = std::popcount(mask);
    return *groups.back();
  }
};

struct Block {
  dim3 index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<std::unique_ptr<char[]>> shared;
  int running = 0;  // threads that have not ended
};

struct Thread {
  Fiber fiber;
  dim3 index;
  int block = 0, warp = 0, lane = 0;
  int rank = 0;  // in the order of priorities
};

struct Cluster {
  const Launch& launch;
  const std::function<void()>& kernel;
  std::mt19937_64 random;
  Schedule schedule = Schedule::kRandom;
  std::vector<Block> blocks;
  Barrier barrier;
  std::vector<Thread> threads;      // by rank
  std::vector<uint64_t> can_go_on;  // a bit a rank
  Fiber caller;
  Thread* current = nullptr;
  int running = 0;  // threads that have not ended
  int64_t switches = 0;
  std::string failure;
};

inline Cluster* cluster;
inline int removed_barrier = -1;  // by its number: see EMULATOR_BARRIER

inline Thread& self() { return *cluster->current; }
inline Block& block() { return cluster->blocks[self().block]; }

// Ends the launch, whose fibers are left where they are.
[[noreturn]] inline void fail(const std::string& failure) {
  cluster->failure = failure;
  self().fiber.switch_to(cluster->caller);
  abort();
}

inline void let_go_on(int rank) { cluster->can_go_on[rank / 64] |= uint64_t{1} << rank % 64; }

// The first thread at or after a rank that could go on, or null.
inline Thread* first_from(size_t rank) {
  const auto& bits = cluster->can_go_on;
  uint64_t word = rank / 64 < bits.size() ? bits[rank / 64] & ~uint64_t{0} << rank % 64 : 0;
  for (size_t i = rank / 64; i < bits.size(); word = ++i < bits.size() ? bits[i] : 0) {
    if (word != 0) return &cluster->threads[64 * i + std::countr_zero(word)];
  }
  return nullptr;
}

// Hands over to whoever's turn it is, which may be the caller.
inline void reschedule() {
  constexpr int64_t kMostSwitches = 1 << 22;  // four times what our kernels take
  Cluster& c = *cluster;
  const bool at_random = c.schedule == Schedule::kRandom;
  Thread* next = first_from(at_random ? c.random() % c.threads.size() : 0);
  if (next == nullptr && at_random) next = first_from(0);
  if (next == nullptr && c.running > 0) {
    fail("deadlock: " + std::to_string(c.running) + " threads wait for some that never come");
  }
  if (++c.switches > kMostSwitches) fail("it hangs");
  Thread* const before = c.current;
  if (next == before) return;
  c.current = next;
  before->fiber.switch_to(next != nullptr ? next->fiber : c.caller);
}

inline void wait(Barrier& barrier) {
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    for (const int rank : barrier.waiting) let_go_on(rank);
    barrier.waiting.clear();
  } else {
    const int rank = self().rank;
    barrier.waiting.push_back(rank);
    cluster->can_go_on[rank / 64] &= ~(uint64_t{1} << rank % 64);
  }
  reschedule();
}

// What each lane of the group has given, once all have.
template <typename T>
struct Given {
  uint32_t mask;
  const unsigned char (*slots)[16];

  T operator[](int lane) const {
    if (lane < 0 || lane > 31 || !(mask >> lane & 1)) fail("a lane outside its group is read");
    T value;
    std::memcpy(&value, slots[lane], sizeof(T));
    return value;
  }
};

template <typename T>
Given<T> exchange(uint32_t mask, T value) {
  static_assert(sizeof(T) <= 16);
  if (!(mask >> self().lane & 1)) fail("a lane takes part in a group that it is not in");
  Group& group = block().warps[self().warp].group(mask);
  auto* const slots = group.slots[group.turn];
  std::memcpy(slots[self().lane], &value, sizeof(T));
  if (group.barrier.arrived + 1 == group.barrier.size) group.turn ^= 1;
  wait(group.barrier);
  return {mask, slots};
}

// The block's shared memory by its place in `Launch::shared_bytes`.
template <typename T>
T* shared(int place) {
  return reinterpret_cast<T*>(block().shared[place].get());
}

// The same place in the shared memory of another block of the cluster.
template <typename T>
T* shared_of(T* mine, int rank) {
  auto* const address = reinterpret_cast<char*>(const_cast<std::remove_const_t<T>*>(mine));
  const auto& blocks = cluster->blocks;
  if (rank < 0 || rank >= static_cast<int>(blocks.size())) fail("the cluster has no such block");
  const Block& other = blocks[rank];
  if (other.running == 0) fail("the shared memory of a block is read that has ended");
  for (size_t i = 0; i < other.shared.size(); ++i) {
    char* const begin = block().shared[i].get();
    if (begin <= address && address < begin + cluster->launch.shared_bytes[i]) {
      return reinterpret_cast<T*>(other.shared[i].get() + (address - begin));
    }
  }
  fail("what is not in shared memory is looked for in that of another block");
}

inline void fill_with_garbage(Block& block) {
  constexpr unsigned char kGarbage[] = {0xFF, 0x7F, 0xA5};  // NaN, large, small and negative
  for (size_t i = 0; i < block.shared.size(); ++i) {
    std::memset(block.shared[i].get(), kGarbage[cluster->random() % 3],
                cluster->launch.shared_bytes[i]);
  }
}

inline void entry() {
  self().fiber.arrived();
  cluster->kernel();
  --cluster->running;
  if (--block().running == 0) fill_with_garbage(block());
  const int rank = self().rank;
  cluster->can_go_on[rank / 64] &= ~(uint64_t{1} << rank % 64);
  reschedule();
}

inline std::vector<int> shuffled(int count, std::mt19937_64& random) {
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  return order;
}

// The threads of the cluster, by number, in the order of their priority.
inline std::vector<int> priorities(Cluster& c) {
  const int threads = c.launch.threads, blocks = c.blocks.size();
  if (c.schedule == Schedule::kThreads) return shuffled(blocks * threads, c.random);
  std::vector<int> order;
  const auto add_warp = [&](int block, int warp) {
    const int lanes = std::min(32, threads - 32 * warp);
    for (const int lane : shuffled(lanes, c.random)) {
      order.push_back(block * threads + 32 * warp + lane);
    }
  };
  const int warps = (threads + 31) / 32;
  if (c.schedule == Schedule::kBlocks) {
    for (const int block : shuffled(blocks, c.random)) {
      for (const int warp : shuffled(warps, c.random)) add_warp(block, warp);
    }
  } else {
    for (const int warp : shuffled(blocks * warps, c.random)) add_warp(warp / warps, warp % warps);
  }
  return order;
}

// Runs one cluster to its end. Returns what went wrong, if anything did.
inline std::string run_cluster(const Launch& launch, const std::function<void()>& kernel,
                               dim3 first_block, uint64_t seed) {
  Cluster c{.launch = launch, .kernel = kernel, .random = std::mt19937_64(seed)};
  cluster = &c;
  c.schedule = static_cast<Schedule>(launch.seed % kSchedules);
  c.blocks.resize(launch.cluster_size);
  const int num_threads = launch.threads * launch.cluster_size;
  c.barrier.size = c.running = num_threads;
  for (unsigned i = 0; i < launch.cluster_size; ++i) {
    Block& block = c.blocks[i];
    block.index = {first_block.x + i, first_block.y, first_block.z};
    block.barrier.size = block.running = launch.threads;
    block.warps.resize((launch.threads + 31) / 32);
    for (const size_t bytes : launch.shared_bytes) {
      block.shared.push_back(std::make_unique_for_overwrite<char[]>(bytes));
    }
    fill_with_garbage(block);
  }
  c.threads.resize(num_threads);
  c.can_go_on.resize((num_threads + 63) / 64);
  const auto order = priorities(c);
  for (int rank = 0; rank < num_threads; ++rank) {
    Thread& thread = c.threads[rank];
    thread.rank = rank;
    thread.block = order[rank] / launch.threads;
    thread.index = {order[rank] % launch.threads, 0, 0};
    thread.warp = thread.index.x / 32;
    thread.lane = thread.index.x % 32;
    thread.fiber.begin(stack(rank), entry);
    let_go_on(rank);
  }
  c.current = first_from(0);
  c.caller.switch_to(c.current->fiber);
  cluster = nullptr;
  return c.failure;
}

// Runs a kernel. Returns null, or what went wrong, which lasts until the next launch.
inline const char* run(const Launch& launch, const std::function<void()>& kernel) {
  static std::string failure;
  std::mt19937_64 random(launch.seed);
  for (unsigned z = 0; z < launch.grid.z; ++z) {
    for (unsigned y = 0; y < launch.grid.y; ++y) {
      for (unsigned x = 0; x < launch.grid.x; x += launch.cluster_size) {
        failure = run_cluster(launch, kernel, {x, y, z}, random());
        if (!failure.empty()) return failure.c_str();
      }
    }
  }
  return nullptr;
}

}  // namespace emulator

// The tests write a barrier as this one with its number, so that it can be removed as it runs.
#define EMULATOR_BARRIER(number, barrier) \
  (::emulator::removed_barrier == (number) ? void() : (barrier))

// What the launch function of a kernel is: called from Python, with pointers, int64_t and double.
#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

EMULATOR_EXPORT void remove_barrier(int64_t number) { emulator::removed_barrier = number; }
