// out = x W^T + bias for float32 x and packed W: no torch, raw pointers.
//
// W [out_features, in_features] is packed in panels of 16 output features, with those 16 weights of
// one input feature side by side: [out_features / 16, in_features, 16], the last panel padded. An
// element of `out` is always summed in the same order, one input feature after another, whatever
// the number of rows: so a row's result does not depend on the rows beside it.
//
// int8 weights have pairs of input features innermost, [.., in_features / 2, 16, 2], and a scale
// for each output feature. A row of x is rounded to int16 with a scale of its own, as fine as int32
// sums allow, and multiplied in integers.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "simd/isa.h"
#include "simd/tile.h"

namespace convai_fast {

constexpr int64_t kBlock = 1024;  // input features that are multiplied before the next panel
constexpr int64_t kChunkBytes = 256 << 10;  // of x, to stay in the second-level cache

struct LinearArguments {
  const void* x;          // float [rows, in_features]; int16 for int8 weights
  const float* x_scales;  // [rows], for int8 weights
  const void* weight;
  const float* scales;  // [out_features], for int8 weights
  const float* bias;    // [out_features] or null
  float* out;           // [rows, out_features]
  int64_t rows, in_features, out_features;
  bool gelu;  // whether out is activated by the tanh approximation of GELU
};

// The rows of a tile: as many as the registers hold accumulators for, beside weights and x.
template <int kWidth>
constexpr int kTileRows = kWidth == 16  ? 12
                          : kWidth == 8 ? 6
                                        : 3;

CONVAI_FAST_INLINE const float* copy_to(float* target, const float* source, int64_t count) {
  return std::copy_n(source, count, target) - count;
}

// Bias and activation, then to `out`, of which the last panel may reach beyond the row.
template <int kWidth, int kRows, int kPanels>
CONVAI_FAST_INLINE void finish(Tile<kWidth, kRows, kPanels>& tile, const LinearArguments& a,
                               int64_t row, int64_t panel) {
  using S = Simd<kWidth>;
  constexpr int64_t kColumns = kPanels * kPanel;
  const int64_t first = panel * kPanel, valid = std::min(kColumns, a.out_features - first);
  float edge[kColumns] = {};
  const float* bias = edge;
  if (a.bias != nullptr)
    bias = valid == kColumns ? a.bias + first : copy_to(edge, a.bias + first, valid);
#pragma GCC unroll 16
  for (int v = 0; v < tile.kColumns; ++v) {
    const auto b = S::load(bias + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.sums[i][v] += b;
      if (a.gelu) tile.sums[i][v] = S::gelu(tile.sums[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    float* out = a.out + (row + i) * a.out_features + first;
    if (valid == kColumns) {
      tile.store_row(i, out);
    } else {
      tile.store_row(i, edge);
      std::copy_n(edge, valid, out);
    }
  }
}

// Products of `kRows` rows of x and `kPanels` panels, over input features [begin, end), added to
// what `out` holds unless this is the beginning.
template <int kWidth, int kRows, int kPanels, typename Weight>
CONVAI_FAST_INLINE void multiply_tile(const LinearArguments& a, int64_t row, int64_t panel,
                                      int64_t begin, int64_t end) {
  constexpr int64_t kColumns = kPanels * kPanel;
  const float* x = static_cast<const float*>(a.x) + row * a.in_features;
  const Weight* weight = static_cast<const Weight*>(a.weight) + panel * a.in_features * kPanel;
  float* out = a.out + row * a.out_features + panel * kPanel;
  const int64_t valid = std::min(kColumns, a.out_features - panel * kPanel);
  float edge[kColumns] = {};

  Tile<kWidth, kRows, kPanels> tile;
  tile.clear();
  if (begin > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const float* so_far = out + i * a.out_features;
      tile.load_row(i, valid == kColumns ? so_far : copy_to(edge, so_far, valid));
    }
  }
  tile.add_products(x, a.in_features, weight, kPanel, a.in_features * kPanel, begin, end);
  if (end == a.in_features) return finish(tile, a, row, panel);
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
    tile.store_row(i, valid == kColumns ? out + i * a.out_features : edge);
    if (valid < kColumns) std::copy_n(edge, valid, out + i * a.out_features);
  }
}

// Products of pairs of int16: lane n of the sums gets x[0] * w[2n] + x[1] * w[2n + 1].
template <int kWidth>
struct PairProducts {
  using Int = typename Vectors<kWidth>::Int;
  using Wide = typename Vectors<kWidth>::Pair;

  static CONVAI_FAST_INLINE Wide load(const int8_t* source) {
#if CONVAI_FAST_ASSEMBLY
    if constexpr (kWidth > 4) {
      // In assembly here and below, since intrinsics must not be inlined into a function without a
      // target, and GCC makes five instructions of the conversion.
      Wide wide;
      asm("vpmovsxbw %1, %0"
          : "=v"(wide)
          : "m"(*reinterpret_cast<const int8_t (*)[2 * kWidth]>(source)));
      return wide;
    }
#endif
    typename Vectors<kWidth>::Bytes w;
    std::memcpy(&w, source, sizeof(w));
    return __builtin_convertvector(w, Wide);
  }

  static CONVAI_FAST_INLINE void accumulate(Int& sums, Int pairs, Wide w) {
#if CONVAI_FAST_ASSEMBLY
    Int products;
    if constexpr (kWidth == 4) {
      products = pairs;
      asm("pmaddwd %1, %0" : "+x"(products) : "x"(w));
    } else {
      asm("vpmaddwd %2, %1, %0" : "=v"(products) : "v"(pairs), "v"(w));
    }
    sums += products;
#else
    // The low and the high half of each 32 bits, with their signs.
    const Int both = (Int)w;
    sums += (pairs << 16 >> 16) * (both << 16 >> 16) + (pairs >> 16) * (both >> 16);
#endif
  }
};

template <int kWidth, int kRows, int kPanels>
CONVAI_FAST_INLINE void multiply_int8_tile(const LinearArguments& a, int64_t row, int64_t panel) {
  using S = Simd<kWidth>;
  using P = PairProducts<kWidth>;
  constexpr int kVectors = kPanel / kWidth;
  const int64_t stride = a.in_features + a.in_features % 2;
  const int16_t* x = static_cast<const int16_t*>(a.x) + row * stride;
  const int8_t* weight = static_cast<const int8_t*>(a.weight) + panel * stride * kPanel;
  typename S::Int sums[kRows][kPanels * kVectors] = {};
  for (int64_t k = 0; k < stride; k += 2) {
    typename P::Wide w[kPanels * kVectors];
#pragma GCC unroll 16
    for (int v = 0; v < kPanels * kVectors; ++v) {
      w[v] =
          P::load(weight + v / kVectors * stride * kPanel + k * kPanel + v % kVectors * 2 * kWidth);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      std::memcpy(&pair, x + i * stride + k, sizeof(pair));
      const typename S::Int pairs = pair - typename S::Int{};
#pragma GCC unroll 16
      for (int v = 0; v < kPanels * kVectors; ++v) P::accumulate(sums[i][v], pairs, w[v]);
    }
  }
  const int64_t first = panel * kPanel;
  const int64_t valid = std::min<int64_t>(kPanels * kPanel, a.out_features - first);
  float edge[kPanels * kPanel] = {};
  const float* scales =
      valid == kPanels * kPanel ? a.scales + first : copy_to(edge, a.scales + first, valid);
  Tile<kWidth, kRows, kPanels> tile;
#pragma GCC unroll 16
  for (int v = 0; v < kPanels * kVectors; ++v) {
    const auto scale = S::load(scales + v * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      tile.sums[i][v] =
          __builtin_convertvector(sums[i][v], typename S::Float) * (scale * a.x_scales[row + i]);
    }
  }
  finish(tile, a, row, panel);
}

template <int kWidth, int kRows, int kPanels, typename Weight>
CONVAI_FAST_INLINE void tile_of(const LinearArguments& a, int64_t row, int64_t panel, int64_t begin,
                                int64_t end) {
  if constexpr (std::is_same_v<Weight, int8_t>) {
    multiply_int8_tile<kWidth, kRows, kPanels>(a, row, panel);
  } else {
    multiply_tile<kWidth, kRows, kPanels, Weight>(a, row, panel, begin, end);
  }
}

// The rows [row, end_row), fewer than kTileRows + 1, by panels [panel, end_panel): one tile with
// exactly so many rows. Few rows take several panels at once, since one panel alone has too few
// sums to keep the multipliers busy.
template <int kWidth, int kRows, typename Weight>
CONVAI_FAST_INLINE void rows_by_panels(const LinearArguments& a, int64_t row, int64_t num_rows,
                                       int64_t panel, int64_t end_panel, int64_t begin,
                                       int64_t end) {
  if constexpr (kRows > 1) {
    if (num_rows < kRows) {
      return rows_by_panels<kWidth, kRows - 1, Weight>(a, row, num_rows, panel, end_panel, begin,
                                                       end);
    }
  }
  constexpr int kTogether = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  for (; panel + kTogether <= end_panel; panel += kTogether) {
    tile_of<kWidth, kRows, kTogether, Weight>(a, row, panel, begin, end);
  }
  for (; panel < end_panel; ++panel) tile_of<kWidth, kRows, 1, Weight>(a, row, panel, begin, end);
}

// All rows by panels [first_panel, end_panel).
template <int kWidth, typename Weight>
CONVAI_FAST_INLINE void linear_body(const LinearArguments& a, int64_t first_panel,
                                    int64_t end_panel) {
  constexpr bool kInt8 = std::is_same_v<Weight, int8_t>;
  // Integer products need a register more than float ones, which are added as they are made.
  constexpr int kRows = kTileRows<kWidth> - (kInt8 ? 1 : 0);
  const int64_t block = kInt8 ? a.in_features : std::min(a.in_features, kBlock);
  const int64_t row_bytes = std::max<int64_t>(1, block * (kInt8 ? 2 : 4));
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / row_bytes / kRows) * kRows;
  for (int64_t first_row = 0; first_row < a.rows; first_row += chunk) {
    const int64_t end_row = std::min(a.rows, first_row + chunk);
    int64_t begin = 0;
    do {
      const int64_t end = std::min(a.in_features, begin + block);
      // One panel for all rows of the chunk, then the next; but with one tile of rows only, all
      // panels at once.
      const int64_t step = end_row - first_row <= kRows ? end_panel - first_panel : 1;
      for (int64_t panel = first_panel; panel < end_panel; panel += step) {
        for (int64_t row = first_row; row < end_row; row += kRows) {
          rows_by_panels<kWidth, kRows, Weight>(a, row, std::min<int64_t>(kRows, end_row - row),
                                                panel, panel + step, begin, end);
        }
      }
      begin = end;
    } while (begin < a.in_features);
  }
}

#if CONVAI_FAST_X86
template <typename Weight>
CONVAI_FAST_AVX512 void linear_avx512(const LinearArguments& a, int64_t first, int64_t end) {
  linear_body<16, Weight>(a, first, end);
}
template <typename Weight>
CONVAI_FAST_AVX2 void linear_avx2(const LinearArguments& a, int64_t first, int64_t end) {
  linear_body<8, Weight>(a, first, end);
}
#endif
template <typename Weight>
void linear_portable(const LinearArguments& a, int64_t first, int64_t end) {
  linear_body<4, Weight>(a, first, end);
}

using Linear = void (*)(const LinearArguments&, int64_t first_panel, int64_t end_panel);

template <typename Weight>
Linear linear_for(Isa isa) {
#if CONVAI_FAST_X86
  if (isa == Isa::kAvx512) return linear_avx512<Weight>;
  if (isa == Isa::kAvx2) return linear_avx2<Weight>;
#endif
  return linear_portable<Weight>;
}

// The largest int16 that `in_features` products with int8 weights can be made of without leaving
// int32: 127 * 22,017 * 768 < 2^31.
inline float largest_int16(int64_t in_features) {
  const int64_t limit = (int64_t{1} << 31) / (127 * std::max<int64_t>(1, in_features)) - 1;
  return static_cast<float>(std::clamp<int64_t>(limit, 1, 32767));
}

// Rounds one row to int16 and returns its scale. Padded to an even length with 0.
inline float quantize_row(const float* x, int64_t in_features, int16_t* quantized) {
  float largest = 0;
  bool is_finite = true;
  for (int64_t k = 0; k < in_features; ++k) {
    largest = std::max(largest, std::fabs(x[k]));
    is_finite &= std::fabs(x[k]) <= std::numeric_limits<float>::max();
  }
  if (!is_finite) {  // no integer stands for it: let the scale carry it to the results
    std::fill_n(quantized, in_features + in_features % 2, int16_t{0});
    return std::numeric_limits<float>::quiet_NaN();
  }
  const float limit = largest_int16(in_features);
  const float inverse = largest > 0 ? limit / largest : 0.0f;
  for (int64_t k = 0; k < in_features; ++k) {
    quantized[k] = static_cast<int16_t>(std::lrintf(x[k] * inverse));
  }
  if (in_features % 2) quantized[in_features] = 0;
  return largest / limit;
}

}  // namespace convai_fast
