// Pointwise passes over relevance beside activations: which elements a thread owns, and how it fetches them.
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

// W elements as they lie in memory. Kernels that are bound by memory fetch all their operands before they use any, so that
// a thread's loads are under way together; unconverted, they wait in few registers.
template <typename T, int W>
struct alignas(sizeof(T) * W) Raw {
  T part[W];
  __device__ __forceinline__ Acc<T> operator[](int i) const { return to_acc(part[i]); }
  __device__ __forceinline__ void set(int i, Acc<T> x) { part[i] = from_acc<T>(x); }
};
// Elements from[0] to from[W - 1]; zeros where the operand is absent.
template <int W, typename T>
__device__ __forceinline__ Raw<T, W> fetch(const T* from, int64_t at) {
  Raw<T, W> x;
  if (from) {
    x = *reinterpret_cast<const Raw<T, W>*>(from + at);
  } else {
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) x.set(i, Acc<T>(0));
  }
  return x;
}
// Nothing where the result is absent.
template <typename T, int W>
__device__ __forceinline__ void put(T* to, int64_t at, const Raw<T, W>& x) {
  if (to) *reinterpret_cast<Raw<T, W>*>(to + at) = x;
}

// Calls body(at, width, vectors) for this thread's elements: V vectors of W, kMapThreads * W apart, of which those with
// at + v * kMapThreads * W + W <= size exist; and, at the ragged end, elements one by one (width and vectors 1).
// Grid: map_grid(m, W * V).
template <int W, int V, typename F>
__device__ __forceinline__ void each_tile(int64_t size, F&& body) {
  using One = std::integral_constant<int, 1>;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * V * kMapThreads + threadIdx.x) * W;
  body(at, std::integral_constant<int, W>{}, std::integral_constant<int, V>{});
  if constexpr (W > 1) {
    const int64_t whole = size - size % W;
    if (whole == size || whole < at || (whole - at) % (kMapThreads * W)) return;  // size % W is 0 but in one long sample
    if (whole - at >= static_cast<int64_t>(V) * kMapThreads * W) return;
    for (int64_t i = whole; i < size; ++i) body(i, One{}, One{});
  }
}

// The epsilon of sample n: its own where there is one.
template <typename T>
__device__ __forceinline__ Acc<T> eps_of(double eps, const void* eps_n, int64_t n) {
  return eps_n ? to_acc(static_cast<const T*>(eps_n)[n]) : static_cast<Acc<T>>(eps);
}
}  // namespace fisnet
