// Products of matrices that change from step to step, as training has them: what is multiplied from
// the right is packed for each product (simd/packed.h), a few blocks at a time, each by the thread
// that multiplies by it, while it is in that core's cache. So packing costs one read of the matrix
// beside some hundred multiplications of every element of it.
//
//   for each group of blocks (64 columns each), shared out to the threads
//     for each part of the features
//       pack the group's part, up to half a megabyte, which the second-level cache holds
//       for each 64 rows of a: multiply by every block of the group
#pragma once

#include <cstdint>

#include "simd/packed.h"

namespace convai_fast::linear {

// As it lies in memory: one of its strides is 1.
template <typename Value>
struct Matrix {
  const Value* data;
  int64_t rows, columns, row_stride, column_stride;

  const Value* at(int64_t row, int64_t column) const {
    return data + row * row_stride + column * column_stride;
  }
};

// out [rows, b.columns] = a b + bias. a is in the format that is multiplied in, its rows `stride`
// apart and `features` long: b.rows, and so many zeros that the format's features come together. In
// parts of simd::features_of_part the sums are those of `packed_linear`, bit for bit.
template <typename Scalar, typename Value, typename Out>
void multiply(const Scalar* a, int64_t stride, int64_t rows, int64_t features, int64_t part,
              const Matrix<Value>& b, const float* bias, Out* out);

// to [columns, features] = x^T, for x [rows, columns], padded with 0 from `rows` on; and the sum of
// each column, unless `sums` is null.
template <typename Scalar>
void transpose(const Scalar* x, int64_t rows, int64_t columns, int64_t features, Scalar* to,
               float* sums);

}  // namespace convai_fast::linear
