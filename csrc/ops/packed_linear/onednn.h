// oneDNN's micro-kernels, which torch ships: products of small blocks in the best instructions that
// the processor has for the format (AMX, AVX512-BF16, AVX512-VNNI, AVX-512, AVX2).
//
// Every element of a product is summed in an order that does not depend on the number of rows.
#pragma once

#include <string>

#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear {

// Whether they multiply the format here, faster than our own loops, and CONVAI_FAST_ISA does not
// ask for fewer instructions.
template <typename Scalar>
bool onednn_multiplies();

// Where they do: which instructions they take, such as "AVX512-BF16".
template <typename Scalar>
std::string onednn_instructions();

// sums [rows, 64], their rows `sums_stride` apart, of some features of a block; added to what is
// there with `add`.
template <typename Scalar>
void onednn_part(const typename Format<Scalar>::Activation* x, int64_t stride, int64_t rows,
                 const Scalar* block, int64_t features, bool add,
                 typename Format<Scalar>::Sum* sums, int64_t sums_stride);

// sums [rows, 64] of one block.
template <typename Scalar>
void onednn_product(const Rows<Scalar>& x, int64_t rows, const Scalar* block,
                    int64_t padded_features, typename Format<Scalar>::Sum* sums);

// Ends a thread's products: AMX has a state that a thread takes and gives back.
void onednn_release();

}  // namespace convai_fast::packed_linear
