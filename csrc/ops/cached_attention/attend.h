// Attention over a cache, over the threads.
#pragma once

#include <vector>

#include "ops/cached_attention/arguments.h"

namespace convai_fast::cached_attention {

template <typename Kept>
void attend(const Arguments<Kept>& arguments, const std::vector<Run>& runs);

}  // namespace convai_fast::cached_attention
