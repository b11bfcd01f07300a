#include "plus_affine.h"

#include "../device/channels.cuh"
#include "../device/maps.cuh"
#include "../device/phi.cuh"

namespace fisnet {
namespace {
template <typename A> __device__ __forceinline__ A positive(A x) { return x > A(0) ? x : A(0); }
template <typename A> __device__ __forceinline__ A above(A x) { return x > A(0) ? A(1) : A(0); }

// den = |k| P - |k-| u + c + e, not below e (without u: k+ P + c + e), 1 where that is 0;  s = R / den;
// plus = k+ s;  minus = |k-| s.
// A thread owns W elements of every gridDim.y-th sample, and all K maps over them. Accumulates in float32 (float64 for
// float64). No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 3) plus_affine_kernel(PlusAffineParams p) {
  using A = Acc<T>;
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    A slope[kWidth];
    channel_values<kWidth>(slope, static_cast<const A*>(p.k), p.planes, at);
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      int64_t j = n * p.shape.maps * p.shape.size + at;
      const Raw<T, kWidth> P = fetch<kWidth>(static_cast<const T*>(p.P), n * p.shape.size + at), u = fetch<kWidth>(static_cast<const T*>(p.u), n * p.shape.size + at);
      Raw<T, kWidth> R = fetch<kWidth>(static_cast<const T*>(p.R), j), rounded;
      const A e = static_cast<A>(p.eps);
      A den[kWidth];
      channel_values<kWidth>(den, static_cast<const A*>(p.c), p.planes, at);
      FISNET_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        if (p.u) {
          const A sum = den[i] + fabs(slope[i]) * P[i] - positive(-slope[i]) * u[i];
          den[i] = denominator(sum < A(0) ? A(0) : sum, e);
        } else {
          den[i] = denominator(den[i] + positive(slope[i]) * P[i], e);
        }
        rounded.set(i, den[i]);
      }
      put(static_cast<T*>(p.den), n * p.shape.size + at, rounded);
      for (int k = 0; k < p.shape.maps; ++k) {
        Raw<T, kWidth> s, plus, minus;
        FISNET_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          const A x = Divisor<A>(den[i])(R[i]);
          s.set(i, x);
          plus.set(i, positive(slope[i]) * x);
          minus.set(i, positive(-slope[i]) * x);
        }
        const int64_t to = j;
        j += p.shape.size;
        if (k + 1 < p.shape.maps) R = fetch<kWidth>(static_cast<const T*>(p.R), j);
        put(static_cast<T*>(p.s), to, s);
        put(static_cast<T*>(p.plus), to, plus);
        put(static_cast<T*>(p.minus), to, minus);
      }
    }
  });
}

// s_bar = k+ plus_bar + |k-| minus_bar;  R_bar = s_bar / den;  z_bar = -sum_k s R_bar;
// P_bar = |k| z_bar (without u: k+ z_bar);  u_bar = -|k-| z_bar;  c_bar = <z_bar, 1>;
// k_bar = <plus_bar, s> + <z_bar, P> where k > 0, <z_bar, u - P> - <minus_bar, s> where k < 0 (without u: 0).
// Blocks own channels, as in device/channels.cuh, and leave k_bar and c_bar of their slab in `partial`. Shared memory: one
// accumulation value an element of the block's vectors, for the reduction. Accumulates in float32 (float64 for float64).
// Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(ChannelGrid::kThreads, 2) plus_affine_backward_kernel(PlusAffineBackwardParams p) {
  using A = Acc<T>;
  A sum[2][W] = {};
  const uint32_t pixels = static_cast<uint32_t>(p.shape.size) / static_cast<uint32_t>(p.planes.channels);  // of one of several samples
  each_of_channel<W>(p.planes, [&](uint32_t position, int64_t offset, int c) {
    const int64_t n = p.shape.samples == 1 ? 0 : position / pixels;
    int64_t j = offset + n * (p.shape.maps - 1) * p.shape.size;
    const Raw<T, W> den = fetch<W>(static_cast<const T*>(p.den), offset), P = fetch<W>(static_cast<const T*>(p.P), offset), u = fetch<W>(static_cast<const T*>(p.u), offset);
    Raw<T, W> plus_bar = fetch<W>(static_cast<const T*>(p.plus_bar), j), minus_bar = fetch<W>(static_cast<const T*>(p.minus_bar), j), s = fetch<W>(static_cast<const T*>(p.s), j);
    A slope[W], z_bar[W] = {};
    values_of_channel(slope, static_cast<const A*>(p.k), p.planes, c);
    for (int k = 0; k < p.shape.maps; ++k) {
      Raw<T, W> R_bar;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        const A x = Divisor<A>(den[i])(positive(slope[i]) * plus_bar[i] + positive(-slope[i]) * minus_bar[i]);
        R_bar.set(i, x);
        z_bar[i] -= s[i] * x;
        sum[0][i] += (above(slope[i]) * plus_bar[i] - above(-slope[i]) * minus_bar[i]) * s[i];
      }
      const int64_t to = j;
      j += p.shape.size;
      if (k + 1 < p.shape.maps) {
        plus_bar = fetch<W>(static_cast<const T*>(p.plus_bar), j);
        minus_bar = fetch<W>(static_cast<const T*>(p.minus_bar), j);
        s = fetch<W>(static_cast<const T*>(p.s), j);
      }
      put(static_cast<T*>(p.R_bar), to, R_bar);
    }
    Raw<T, W> P_bar, u_bar;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const A down = p.u ? positive(-slope[i]) : A(0);
      sum[0][i] += z_bar[i] * (above(slope[i]) * P[i] + above(down) * (u[i] - P[i]));
      sum[1][i] += z_bar[i];
      P_bar.set(i, (positive(slope[i]) + down) * z_bar[i]);
      u_bar.set(i, -down * z_bar[i]);
    }
    put(static_cast<T*>(p.P_bar), offset, P_bar);
    put(static_cast<T*>(p.u_bar), offset, u_bar);
  });
  store_channel_partials<2, W>(p.planes, sum, static_cast<A*>(p.partial));
}

template <typename T, int W>
int backward(const PlusAffineBackwardParams& p, cudaStream_t stream) {
  const ChannelGrid g = ChannelGrid::of(p.planes, W);
  const dim3 grid(static_cast<unsigned>(g.tiles), static_cast<unsigned>(p.slabs)), block(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y));
  const int error = static_cast<int>(launch(plus_affine_backward_kernel<T, W>, grid, block, 0, stream, p));
  return error ? error : finish_channel_sums<Acc<T>>(p.partial, p.sums, p.slabs, 2 * p.planes.channels, stream);
}
}  // namespace

int launch_plus_affine(const PlusAffineParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && channel_vectors(p.planes, kVec<T>) && aligned16(p.R, p.P, p.u, p.k, p.c, p.plus, p.minus, p.s, p.den);
    const auto kernel = wide ? plus_affine_kernel<T, kVec<T>> : plus_affine_kernel<T, 1>;
    return static_cast<int>(launch(kernel, map_grid(p.shape, wide ? kVec<T> : 1), dim3(kMapThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

int launch_plus_affine_backward(const PlusAffineBackwardParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && p.planes.vectors(kVec<T>) &&
                      aligned16(p.plus_bar, p.minus_bar, p.s, p.den, p.P, p.u, p.k, p.R_bar, p.P_bar, p.u_bar);
    return wide ? backward<T, kVec<T>>(p, st) : backward<T, 1>(p, st);
  });
}

FISNET_LAUNCHER(plus_affine, launch_plus_affine);
FISNET_LAUNCHER(plus_affine_backward, launch_plus_affine_backward);
FISNET_KERNEL(plus_affine_kernel<float, 4>);
FISNET_KERNEL(plus_affine_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(plus_affine_backward_kernel<float, 4>);
FISNET_KERNEL(plus_affine_backward_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
