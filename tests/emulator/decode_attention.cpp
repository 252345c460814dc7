#include "cuda.h"
#include "ops/decode_attention/cuda_kernel.cuh"

using namespace convai_fast::decode_attention;

template <>
inline constexpr bool convai_fast::kIsUpperHalf<emulator::BFloat16> = true;

// kind: 0 float32, 1 bfloat16, 2 float16. Strides are those of q, k, v, keys, values, slots and
// lengths, without those of features.
EMULATOR_EXPORT const char* decode_attention(int64_t kind, const void* q, const void* k,
                                             const void* v, void* keys, void* values,
                                             const int64_t* slots, const int64_t* lengths,
                                             const int64_t* strides, int64_t rows,
                                             int64_t num_heads, int64_t num_kv_heads,
                                             int64_t head_dim, int64_t num_slots, int64_t capacity,
                                             void* out, int64_t seed) {
  const auto run_as = [&]<typename Scalar>(Scalar) {
    const auto heads = [&](const void* data, const int64_t* strides) {
      return Heads<const Scalar>{static_cast<const Scalar*>(data), strides[0],
                                 static_cast<int>(strides[1])};
    };
    const auto cache = [&](void* data, const int64_t* strides) {
      return Cache<Scalar>{static_cast<Scalar*>(data), strides[0], static_cast<int>(strides[1]),
                           static_cast<int>(strides[2])};
    };
    const Input<Scalar> in{.q = heads(q, strides),
                           .k = heads(k, strides + 2),
                           .v = heads(v, strides + 4),
                           .keys = cache(keys, strides + 6),
                           .values = cache(values, strides + 9),
                           .slots = {slots, strides[12]},
                           .lengths = {lengths, strides[13]},
                           .out = {static_cast<Scalar*>(out), num_heads * head_dim, head_dim},
                           .num_slots = num_slots,
                           .capacity = capacity,
                           .num_kv_heads = static_cast<int>(num_kv_heads),
                           .group = static_cast<int>(num_heads / num_kv_heads),
                           .head_dim = static_cast<int>(head_dim),
                           .log_lanes = log_lanes_for(head_dim),
                           .scale = scale_for(head_dim)};
    const char* failure = nullptr;
    for_variant(in, [&]<int kQueries, bool kAligned>() {
      const Grid grid = grid_of(in, rows, kQueries);
      const emulator::Launch launch{.grid = {grid.x, grid.y},
                                    .threads = static_cast<unsigned>(grid.threads),
                                    .shared_bytes = {static_cast<size_t>(grid.shared_bytes)},
                                    .seed = static_cast<uint64_t>(seed)};
      failure = emulator::run(launch, [&] {
        decode_block<Scalar, kQueries, kAligned>(in, emulator::shared<float>(0));
      });
    });
    return failure;
  };
  if (kind == 0) return run_as(float{});
  if (kind == 1) return run_as(emulator::BFloat16{});
  return run_as(emulator::Half{});
}
