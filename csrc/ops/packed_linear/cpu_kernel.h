// The kernels of a packed product, for one instruction set: no torch, raw pointers.
#include "ops/packed_linear/own_product.h"
#include "ops/packed_linear/results.h"
#include "ops/packed_linear/rounding.h"
