// The sums of some rows of x and one block of the weight by our own loops: for few rows, which wait
// for memory, and for processors for which oneDNN has no kernel in the format.
#include "ops/packed_linear/arguments.h"

namespace convai_fast::packed_linear::CONVAI_FAST_ISA {

using namespace simd::CONVAI_FAST_ISA;

// sums [rows, 64] of one block, for up to kMostRows rows.
template <typename Scalar>
CONVAI_FAST_TARGET void own_product_kernel(const Rows<Scalar>& x, int64_t rows, const Scalar* block,
                                           int64_t padded_features,
                                           typename Format<Scalar>::Sum* sums) {
  block_product(x.data, x.stride, rows, block, kBlock, padded_features, sums, kBlock);
}

}  // namespace convai_fast::packed_linear::CONVAI_FAST_ISA
