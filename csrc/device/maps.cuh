// Pointwise passes over relevance beside activations: which elements a thread owns.
#pragma once
#include <type_traits>

#include "layout.h"
#include "numeric.cuh"

namespace fisnet {
constexpr int kMapThreads = 256;

// Grid of blocks of kMapThreads: x over the elements of a sample, W a thread; y over samples, which the kernel strides.
inline dim3 map_grid(const Maps& m, int width) {
  return dim3(static_cast<unsigned>(ceil_div<int64_t>(m.size, kMapThreads * width)), static_cast<unsigned>(std::min<int64_t>(m.samples, 65535)));
}

// Calls body(at, width) for this thread's elements: one vector of W (width::value == W) or, at the ragged end, its
// elements one by one (width::value == 1).
template <int W, typename F>
__device__ __forceinline__ void each_vector(int64_t size, F&& body) {
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * W;
  if (at + W <= size) {
    body(at, std::integral_constant<int, W>{});
  } else if constexpr (W > 1) {
    for (int64_t i = at; i < size; ++i) body(i, std::integral_constant<int, 1>{});
  }
}
}  // namespace fisnet
