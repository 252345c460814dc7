// What `dropout` drops, here and where other operators do it themselves.
#pragma once

#include <cstdint>

namespace convai_fast::dropout {

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // what draws a smaller word is dropped
  float scale;         // of what is kept

  Dropout(double p, uint64_t seed)
      : seed(seed),
        threshold(static_cast<uint32_t>(p * 0x1p32)),
        scale(static_cast<float>(1.0 / (1.0 - p))) {}
};

}  // namespace convai_fast::dropout
