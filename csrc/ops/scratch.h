// Buffers that a thread keeps from call to call, so that it does not ask for their memory again.
#pragma once

#include <cstdint>
#include <vector>

namespace convai_fast {

// The values of `buffer`, which has room for `size` of them from here on.
template <typename Value>
Value* at_least(std::vector<Value>& buffer, int64_t size) {
  if (static_cast<int64_t>(buffer.size()) < size) buffer.resize(size);
  return buffer.data();
}

}  // namespace convai_fast
