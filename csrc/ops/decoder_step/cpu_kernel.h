// Rotary positions for one instruction set: no torch, raw pointers.

namespace convai_fast::decoder_step::CONVAI_FAST_ISA {

// Turns heads [heads, 2 * half], each of whose halves are a coordinate of points in a plane.
CONVAI_FAST_TARGET inline void rotate_kernel(const float* __restrict cosines,
                                             const float* __restrict sines, int64_t half,
                                             int64_t heads, float* x) {
  for (; heads > 0; --heads, x += 2 * half) {
    float* __restrict first = x, * __restrict second = x + half;
    for (int64_t k = 0; k < half; ++k) {
      const float a = first[k], b = second[k];
      first[k] = a * cosines[k] - b * sines[k];
      second[k] = b * cosines[k] + a * sines[k];
    }
  }
}

}  // namespace convai_fast::decoder_step::CONVAI_FAST_ISA
