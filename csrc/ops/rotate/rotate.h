// Rotary positions of heads in float32.
#pragma once

#include <cstdint>

namespace convai_fast::rotate {

// Turns heads [heads, 2 * half] by angles with these cosines and sines [half]; `to` may be `x`.
void rotate_heads(const float* x, const float* cosines, const float* sines, int64_t half,
                  int64_t heads, float* to);

}  // namespace convai_fast::rotate
