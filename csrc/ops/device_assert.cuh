// `assert` for what a GPU is given, which NDEBUG leaves in place: the host meets it when it next
// waits for the device.
#pragma once

#undef NDEBUG
#include <cassert>
