// Pointwise passes over relevance beside activations: which elements a thread owns, and how it fetches them.
#pragma once
#include <cstring>
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

// W elements as they lie in memory: one, or 16 bytes of them. Kernels that are bound by memory fetch all their operands before
// they use any, so that a thread's loads are under way together. That is why the elements stay in whole words until they are
// asked for: as elements of their own, the compiler would pull them apart, and wait for them, right behind each load.
template <typename T, int W>
class Raw {
 public:
  __device__ __forceinline__ Acc<T> operator[](int i) const {
    T x;
    if constexpr (sizeof(T) == 2) {
      const uint16_t bits = static_cast<uint16_t>(word_[i / 2] >> (i % 2 * 16));
      memcpy(static_cast<void*>(&x), &bits, 2);
    } else if constexpr (sizeof(T) == 4) {
      memcpy(static_cast<void*>(&x), &word_[i], 4);
    } else {
      const uint64_t bits = word_[2 * i] | static_cast<uint64_t>(word_[2 * i + 1]) << 32;
      memcpy(static_cast<void*>(&x), &bits, 8);
    }
    return to_acc(x);
  }
  // In the order of i.
  __device__ __forceinline__ void set(int i, Acc<T> value) {
    const T x = from_acc<T>(value);
    if constexpr (sizeof(T) == 2) {
      uint16_t bits;
      memcpy(&bits, &x, 2);
      word_[i / 2] = i % 2 ? word_[i / 2] | static_cast<uint32_t>(bits) << 16 : bits;
    } else if constexpr (sizeof(T) == 4) {
      memcpy(&word_[i], &x, 4);
    } else {
      uint64_t bits;
      memcpy(&bits, &x, 8);
      word_[2 * i] = static_cast<uint32_t>(bits);
      word_[2 * i + 1] = static_cast<uint32_t>(bits >> 32);
    }
  }
  // From and to from[at], ..., from[at + W - 1]; absent operands read 0, absent results go nowhere.
  __device__ __forceinline__ void fetch(const T* from, int64_t at) {
    if (!from) return;
    if constexpr (W == 1) {
      set(0, to_acc(from[at]));
    } else {
      const uint4 q = *reinterpret_cast<const uint4*>(from + at);
      word_[0] = q.x; word_[1] = q.y; word_[2] = q.z; word_[3] = q.w;
    }
  }
  __device__ __forceinline__ void put(T* to, int64_t at) const {
    if (!to) return;
    if constexpr (W == 1) {
      to[at] = from_acc<T>((*this)[0]);
    } else {
      store16(to + at, word_);
    }
  }
  // Inside a loop: what follows from these elements is worked out again in every round. The compiler would do it once, before
  // the loop, and spill for want of registers.
  __device__ __forceinline__ void renew() {
#if !defined(FISNET_EMU)
    FISNET_UNROLL
    for (uint32_t& word : word_) asm volatile("" : "+r"(word));
#endif
  }

 private:
  static_assert(W == 1 || W * sizeof(T) == 16, "one element, or 16 bytes");
  uint32_t word_[W * sizeof(T) < 4 ? 1 : W * sizeof(T) / 4] = {};
};
template <int W, typename T>
__device__ __forceinline__ Raw<T, W> fetch(const T* from, int64_t at) {
  Raw<T, W> x;
  x.fetch(from, at);
  return x;
}
template <typename T, int W>
__device__ __forceinline__ void put(T* to, int64_t at, const Raw<T, W>& x) { x.put(to, at); }

// Calls body(at, width, vectors) for this thread's elements: V vectors of W, kMapThreads * W apart, where all of them are;
// else those that are, one by one; and at the ragged end elements one by one. Grid: map_grid(m, W * V).
template <int W, int V, typename F>
__device__ __forceinline__ void each_tile(int64_t size, F&& body) {
  constexpr std::integral_constant<int, 1> kOne{};
  constexpr std::integral_constant<int, W> kWidth{};
  constexpr int64_t kStep = kMapThreads * W;
  const int64_t at = static_cast<int64_t>(blockIdx.x) * V * kStep + threadIdx.x * W;
  if (at + (V - 1) * kStep + W <= size) {
    body(at, kWidth, std::integral_constant<int, V>{});
    return;
  }
  for (int64_t i = at; i < size && i < at + V * kStep; i += kStep) {
    if (i + W <= size) {
      body(i, kWidth, kOne);
    } else {
      for (int64_t k = i; k < size; ++k) body(k, kOne, kOne);
    }
  }
}

// The epsilon of sample n: its own where there is one.
template <typename T>
__device__ __forceinline__ Acc<T> eps_of(double eps, const void* eps_n, int64_t n) {
  return eps_n ? to_acc(static_cast<const T*>(eps_n)[n]) : static_cast<Acc<T>>(eps);
}
}  // namespace fisnet
