// The instruction peak: products a second, with all operands in registers, for each instruction
// that this processor has. Built and run by bench_products.py:
//
//   c++ -O2 -pthread peak.cpp -o peak && ./peak 2
//   float32 511.8
//
// is 511.8 thousand million multiplications and additions a second on two threads. Written in
// assembly, so that no compiler keeps the sums anywhere but in registers. AMX is not measured.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

// Fourteen chains of sums hide the latency of an instruction; each round adds once to every chain.
#define CHAIN(instruction, width, n) instruction " %%" width "14, %%" width "15, %%" width #n "\n"
#define CHAINS(instruction, width)                                                               \
  CHAIN(instruction, width, 0)                                                                   \
  CHAIN(instruction, width, 1) CHAIN(instruction, width, 2) CHAIN(instruction, width, 3)         \
      CHAIN(instruction, width, 4) CHAIN(instruction, width, 5) CHAIN(instruction, width, 6)     \
          CHAIN(instruction, width, 7) CHAIN(instruction, width, 8) CHAIN(instruction, width, 9) \
              CHAIN(instruction, width, 10) CHAIN(instruction, width, 11)                        \
                  CHAIN(instruction, width, 12) CHAIN(instruction, width, 13)
constexpr double kChains = 14;

#define LOOP(name, instruction, width)                                                           \
  void name(long rounds) {                                                                       \
    asm volatile("vzeroall\n1:\n" CHAINS(instruction, width) "dec %0\njnz 1b\nvzeroupper\n"      \
                 : "+r"(rounds)                                                                  \
                 :                                                                               \
                 : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", \
                   "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15");                \
  }
LOOP(float32_avx2, "vfmadd231ps", "ymm")
LOOP(float32_avx512, "vfmadd231ps", "zmm")
LOOP(bfloat16_avx512, "vdpbf16ps", "zmm")
LOOP(int8_avx512, "vpdpbusd", "zmm")

// Thousand millions of operations a second, the best of seven tries: other work only lowers it.
double rate(void (*loop)(long), double operations, int num_threads) {
  constexpr long kRounds = 20'000'000;
  std::vector<double> rates;
  for (int i = 0; i < 7; ++i) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> threads;
    for (int t = 0; t < num_threads; ++t) threads.emplace_back(loop, kRounds);
    for (auto& thread : threads) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    rates.push_back(num_threads * kRounds * kChains * operations / seconds.count() / 1e9);
  }
  return *std::max_element(rates.begin(), rates.end());
}

int main(int, char** arguments) {
  const int threads = std::atoi(arguments[1]);
  if (__builtin_cpu_supports("avx512f")) {
    std::printf("float32 %.1f\n", rate(float32_avx512, 2 * 16, threads));
  } else if (__builtin_cpu_supports("avx2")) {
    std::printf("float32 %.1f\n", rate(float32_avx2, 2 * 8, threads));
  }
  if (__builtin_cpu_supports("avx512bf16")) {
    std::printf("bfloat16 %.1f\n", rate(bfloat16_avx512, 2 * 32, threads));
  }
  if (__builtin_cpu_supports("avx512vnni")) {
    std::printf("int8 %.1f\n", rate(int8_avx512, 2 * 64, threads));
  }
}
