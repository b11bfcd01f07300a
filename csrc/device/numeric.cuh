// Element types of kernels: accumulation type, conversion, 16-byte vectors, and the choice of a type at launch.
#pragma once
#include "dtype.h"
#include "portable.cuh"

namespace fisnet {
// Accumulate in float32 or wider.
template <typename T> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <typename T> using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
__device__ __forceinline__ double to_acc(double x) { return x; }

template <typename T> __device__ __forceinline__ T from_acc(Acc<T> x);
template <> __device__ __forceinline__ float from_acc<float>(float x) { return x; }
template <> __device__ __forceinline__ __nv_bfloat16 from_acc<__nv_bfloat16>(float x) { return __float2bfloat16(x); }
template <> __device__ __forceinline__ __half from_acc<__half>(float x) { return __float2half(x); }
template <> __device__ __forceinline__ double from_acc<double>(double x) { return x; }

// ---- W elements at once: 16 bytes (W = kVec<T>) or one element (W = 1), always as accumulation values ----------------
template <typename T> constexpr int kVec = 16 / static_cast<int>(sizeof(T));

template <typename T> struct alignas(16) Pack { T part[kVec<T>]; };
// One 16-byte access of global memory.
template <typename T> __device__ __forceinline__ Pack<T> load_pack(const T* __restrict__ from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Pack<T> pack;
  memcpy(&pack, &bits, sizeof(pack));
  return pack;
}

template <typename T, int W>
__device__ __forceinline__ void load(Acc<T> (&x)[W], const T* __restrict__ from) {
  if constexpr (W == 1) {
    x[0] = to_acc(*from);
  } else {
    static_assert(W == kVec<T>, "a vector has 16 bytes");
    const Pack<T> pack = load_pack(from);
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) x[i] = to_acc(pack.part[i]);
  }
}

// A vector is written by one instruction: `store` to global memory, `store_shared` to shared memory.
template <typename T, int W, bool kShared = false>
__device__ __forceinline__ void store(T* __restrict__ to, const Acc<T> (&x)[W]) {
  if constexpr (W == 1) {
    *to = from_acc<T>(x[0]);
  } else {
    static_assert(W == kVec<T>, "a vector has 16 bytes");
    Pack<T> pack;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) pack.part[i] = from_acc<T>(x[i]);
    if constexpr (kShared) store16_shared(to, &pack);
    else store16(to, &pack);
  }
}
template <typename T, int W>
__device__ __forceinline__ void store_shared(T* __restrict__ to, const Acc<T> (&x)[W]) { store<T, W, true>(to, x); }

// ---- at launch -----------------------------------------------------------------------------------------------------------
// Whether all the pointers (null ones are absent operands) sit on 16-byte boundaries.
template <typename... P> inline bool aligned16(const P*... pointers) {
  return (((reinterpret_cast<uintptr_t>(pointers) & 15) == 0) && ...);
}

template <typename T> struct TypeTag { using type = T; };

// Calls go(TypeTag<T>{}) for the element type; go returns a cudaError_t as int.
template <typename F> inline int with_type(DType dtype, F&& go) {
  switch (dtype) {
    case DType::f32: return go(TypeTag<float>{});
    case DType::bf16: return go(TypeTag<__nv_bfloat16>{});
    case DType::f16: return go(TypeTag<__half>{});
    case DType::f64: return go(TypeTag<double>{});
  }
  return static_cast<int>(cudaErrorInvalidValue);
}

template <typename I> __host__ __device__ inline I ceil_div(I n, I by) { return (n + by - 1) / by; }
}  // namespace fisnet
