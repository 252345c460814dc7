// A packed product over the threads.
#pragma once

#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear {

// results = x W^T + bias, with x float32, its rows `stride` apart; of x normalized, with a norm.
template <typename Scalar>
void multiply(const float* x, int64_t stride, int64_t rows, const Norm* norm,
              const Weight<Scalar>& weight, const Results& results);

// results = activation(x G^T + bias) * (x W^T + bias), for `gate` G and `up` W of one shape. The
// factors do not leave the cache, and x is normalized and rounded once for both.
template <typename Scalar>
void multiply_gated(const float* x, int64_t stride, int64_t rows, const Norm* norm,
                    const Weight<Scalar>& gate, const Weight<Scalar>& up, const Results& results);

// x [rows, features], where it is: by this thread, and by all.
void normalize_rows(float* x, int64_t rows, int64_t features, const Norm& norm);
void normalize(float* x, int64_t rows, int64_t features, const Norm& norm);

}  // namespace convai_fast::packed_linear
