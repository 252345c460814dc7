// Marks functions that CPU and CUDA code share.
#pragma once

#if defined(__CUDACC__)
#define CONVAI_FAST_HOST_DEVICE __host__ __device__
#else
#define CONVAI_FAST_HOST_DEVICE
#endif
