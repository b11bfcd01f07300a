#include "ratio.h"

#include "../device/maps.cuh"
#include "../device/phi.cuh"

namespace fisnet {
namespace {
// s = R / (z + e sign z), sign 0 = +1, 0 / 0 = 0; den = the denominator (1 where that is 0).
// A thread owns W elements of every gridDim.y-th sample, and all K maps over them: z is read once, the next map is on its
// way while one is stored. Accumulates in float32 (float64 for float64). No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) ratio_kernel(RatioParams p) {
  using A = Acc<T>;
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      int64_t j = n * p.shape.maps * p.shape.size + at;
      const Raw<T, kWidth> z = fetch<kWidth>(static_cast<const T*>(p.z), n * p.shape.size + at);
      Raw<T, kWidth> R = fetch<kWidth>(static_cast<const T*>(p.R), j), rounded;
      const A e = eps_of<T>(p.eps, p.eps_n, n);
      A den[kWidth];
      FISNET_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        den[i] = denominator(z[i], z[i] < A(0) && !p.nonneg ? -e : e);
        rounded.set(i, den[i]);
      }
      put(static_cast<T*>(p.den), n * p.shape.size + at, rounded);
      for (int k = 0; k < p.shape.maps; ++k) {
        Raw<T, kWidth> s;
        FISNET_UNROLL
        for (int i = 0; i < kWidth; ++i) s.set(i, Divisor<A>(den[i])(R[i]));
        const int64_t to = j;
        j += p.shape.size;
        if (k + 1 < p.shape.maps) R = fetch<kWidth>(static_cast<const T*>(p.R), j);
        put(static_cast<T*>(p.s), to, s);
      }
    }
  });
}

// R_bar = s_bar / den;  z_bar = -sum_k s R_bar.
// A thread owns W elements of every gridDim.y-th sample, and all K maps over them. Accumulates in float32 (float64 for
// float64). No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 3) ratio_backward_kernel(RatioBackwardParams p) {
  using A = Acc<T>;
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      int64_t j = n * p.shape.maps * p.shape.size + at;
      const Raw<T, kWidth> den = fetch<kWidth>(static_cast<const T*>(p.den), n * p.shape.size + at);
      Raw<T, kWidth> s_bar = fetch<kWidth>(static_cast<const T*>(p.s_bar), j), s = fetch<kWidth>(static_cast<const T*>(p.s), j);
      A z_bar[kWidth] = {};
      for (int k = 0; k < p.shape.maps; ++k) {
        Raw<T, kWidth> R_bar;
        FISNET_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          const A x = Divisor<A>(den[i])(s_bar[i]);
          R_bar.set(i, x);
          z_bar[i] -= s[i] * x;
        }
        const int64_t to = j;
        j += p.shape.size;
        if (k + 1 < p.shape.maps) {
          s_bar = fetch<kWidth>(static_cast<const T*>(p.s_bar), j);
          s = fetch<kWidth>(static_cast<const T*>(p.s), j);
        }
        put(static_cast<T*>(p.R_bar), to, R_bar);
      }
      if (p.z_bar) {
        Raw<T, kWidth> total;
        FISNET_UNROLL
        for (int i = 0; i < kWidth; ++i) total.set(i, z_bar[i]);
        put(static_cast<T*>(p.z_bar), n * p.shape.size + at, total);
      }
    }
  });
}
}  // namespace

int launch_ratio(const RatioParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && aligned16(p.R, p.z, p.s, p.den);
    const auto kernel = wide ? ratio_kernel<T, kVec<T>> : ratio_kernel<T, 1>;
    return static_cast<int>(launch(kernel, map_grid(p.shape, wide ? kVec<T> : 1), dim3(kMapThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

int launch_ratio_backward(const RatioBackwardParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && aligned16(p.s_bar, p.s, p.den, p.R_bar, p.z_bar);
    const auto kernel = wide ? ratio_backward_kernel<T, kVec<T>> : ratio_backward_kernel<T, 1>;
    return static_cast<int>(launch(kernel, map_grid(p.shape, wide ? kVec<T> : 1), dim3(kMapThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

FISNET_LAUNCHER(ratio, launch_ratio);
FISNET_LAUNCHER(ratio_backward, launch_ratio_backward);
FISNET_KERNEL(ratio_kernel<float, 4>);
FISNET_KERNEL(ratio_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(ratio_backward_kernel<float, 4>);
FISNET_KERNEL(ratio_backward_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
