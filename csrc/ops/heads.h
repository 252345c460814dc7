// Queries, keys or values as attention reads and writes them: no torch.
#pragma once

#include <cstdint>

namespace convai_fast {

// [tokens, num_heads, head_dim]: a token's heads lie side by side, and tokens `stride` apart, so
// that the parts of one projection to queries, keys and values are read where they are.
template <typename Scalar>
struct Heads {
  Scalar* data;
  int64_t stride;
  int64_t head_dim;

  Scalar* at(int64_t token, int64_t head) const { return data + token * stride + head * head_dim; }
};

}  // namespace convai_fast
