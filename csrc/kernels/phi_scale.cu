#include "phi_scale.h"

#include "../device/channels.cuh"
#include "../device/maps.cuh"

namespace fisnet {
namespace {
// W neighbouring elements of one sample's activation, and all K maps over them, so `a` is read once.
template <typename T, int W>
__device__ __forceinline__ void phi_scale_at(const PhiScaleParams& p, int64_t at) {
  using A = Acc<T>;
  const T* const g = static_cast<const T*>(p.g);
  const T* const skip = static_cast<const T*>(p.skip);
  const T* const rest = static_cast<const T*>(p.rest);
  T* const s_to = static_cast<T*>(p.s);
  T* const out_to = static_cast<T*>(p.out);

  A scale[W];
  if (p.scale) {
    const A* const from = static_cast<const A*>(p.scale);
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) scale[i] = from[channel_of(p.planes, at + i)];
  }
  for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
    A a[W];
    load<T, W>(a, static_cast<const T*>(p.a) + n * p.shape.size + at);
    const A e = p.eps_n ? to_acc(static_cast<const T*>(p.eps_n)[n]) : static_cast<A>(p.eps);
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) a[i] = a[i] == A(0) ? A(0) : a[i] / (a[i] + e);  // phi; 0 / 0 is 0
    for (int k = 0; k < p.shape.maps; ++k) {
      const int64_t j = (n * p.shape.maps + k) * p.shape.size + at;
      A s[W];
      load<T, W>(s, g + j);
      if (skip) {
        A more[W];
        load<T, W>(more, skip + j);
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) s[i] += more[i];
      }
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) s[i] *= a[i];
      if (s_to) store<T, W>(s_to + j, s);
      if (!out_to) continue;
      A more[W] = {};
      if (rest) load<T, W>(more, rest + j);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) s[i] = s[i] * scale[i] + more[i];
      store<T, W>(out_to + j, s);
    }
  }
}

// s = a / (a + e) . (g + skip);  out = scale . s + rest.
// A thread owns W elements of every gridDim.y-th sample. Accumulates in float32 (float64 for float64). No shared memory.
// Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) phi_scale_kernel(PhiScaleParams p) {
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) { phi_scale_at<T, decltype(width)::value>(p, at); });
}

// One vector of the adjoint, all K maps: u = scale s_bar / (a + e);  g_bar = a u;  a_bar = sum_k e (s / a) u.
// The ratios are formed first, so that products of small numbers do not underflow. Adds <s_bar, s> to `dot` with a scale.
template <typename T, int W>
__device__ __forceinline__ void phi_scale_adjoint(const PhiScaleBackwardParams& p, int64_t n, int64_t at, const Acc<T> (&scale)[W], Acc<T> (&dot)[W]) {
  using A = Acc<T>;
  A a[W], a_bar[W] = {};
  load<T, W>(a, static_cast<const T*>(p.a) + n * p.shape.size + at);
  const A e = p.eps_n ? to_acc(static_cast<const T*>(p.eps_n)[n]) : static_cast<A>(p.eps);
  for (int k = 0; k < p.shape.maps; ++k) {
    const int64_t j = (n * p.shape.maps + k) * p.shape.size + at;
    A s_bar[W], s[W];
    load<T, W>(s_bar, static_cast<const T*>(p.s_bar) + j);
    if (p.s) load<T, W>(s, static_cast<const T*>(p.s) + j);
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      if (p.scale_bar) dot[i] += s_bar[i] * s[i];
      const A u = a[i] == A(0) ? A(0) : scale[i] * s_bar[i] / (a[i] + e);  // a dead unit passes nothing
      s_bar[i] = a[i] * u;
      if (p.a_bar) a_bar[i] += a[i] == A(0) ? A(0) : e * (s[i] / a[i]) * u;
    }
    store<T, W>(static_cast<T*>(p.g_bar) + j, s_bar);
  }
  if (p.a_bar) store<T, W>(static_cast<T*>(p.a_bar) + n * p.shape.size + at, a_bar);
}

// The adjoint without scale: a thread owns W elements of every gridDim.y-th sample. No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) phi_scale_backward_kernel(PhiScaleBackwardParams p) {
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Acc<T> one[kWidth], unused[kWidth];
    FISNET_UNROLL
    for (int i = 0; i < kWidth; ++i) one[i] = 1;
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) phi_scale_adjoint<T, kWidth>(p, n, at, one, unused);
  });
}

// The adjoint with scale: blocks own channels, as in device/channels.cuh, and leave <s_bar, s> a channel in `partial`.
template <typename T, int W>
__global__ void __launch_bounds__(ChannelGrid::kThreads, 2) phi_scale_bn_backward_kernel(PhiScaleBackwardParams p) {
  using A = Acc<T>;
  A dot[1][W] = {};
  const uint32_t pixels = static_cast<uint32_t>(p.shape.size / p.planes.channels);
  each_of_channel<W>(p.planes, [&](uint32_t position, int64_t offset, int c) {
    A scale[W];
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) scale[i] = static_cast<const A*>(p.scale)[p.planes.inner == 1 ? c + i : c];
    const int64_t n = p.shape.samples == 1 ? 0 : position / pixels;
    phi_scale_adjoint<T, W>(p, n, offset - n * p.shape.size, scale, dot[0]);
  });
  if (p.partial) store_channel_partials<1, W>(p.planes, dot, static_cast<A*>(p.partial));
}

template <typename T, int W>
int forward(const PhiScaleParams& p, cudaStream_t stream) {
  return static_cast<int>(launch(phi_scale_kernel<T, W>, map_grid(p.shape, W), dim3(kMapThreads), 0, stream, p));
}

template <typename T, int W>
int backward(const PhiScaleBackwardParams& p, cudaStream_t stream) {
  if (!p.scale) {
    return static_cast<int>(launch(phi_scale_backward_kernel<T, W>, map_grid(p.shape, W), dim3(kMapThreads), 0, stream, p));
  }
  ChannelGrid g = ChannelGrid::of(p.planes, W);
  const dim3 grid(static_cast<unsigned>(g.tiles), static_cast<unsigned>(p.slabs));
  const int error = static_cast<int>(launch(phi_scale_bn_backward_kernel<T, W>, grid, dim3(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y)), 0, stream, p));
  if (error || !p.scale_bar) return error;
  using A = Acc<T>;
  const unsigned blocks = static_cast<unsigned>(ceil_div(p.planes.channels, 256));
  return static_cast<int>(launch(finish_channel_sums_kernel<A>, dim3(blocks), dim3(256), 0, stream, static_cast<const A*>(p.partial), static_cast<A*>(p.scale_bar), p.slabs, p.planes.channels));
}
}  // namespace

int launch_phi_scale(const PhiScaleParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && (!p.scale || p.planes.vectors(kVec<T>)) && aligned16(p.g, p.a, p.skip, p.rest, p.s, p.out);
    return wide ? forward<T, kVec<T>>(p, st) : forward<T, 1>(p, st);
  });
}

int launch_phi_scale_backward(const PhiScaleBackwardParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && (!p.scale || p.planes.vectors(kVec<T>)) && aligned16(p.s_bar, p.s, p.a, p.g_bar, p.a_bar);
    return wide ? backward<T, kVec<T>>(p, st) : backward<T, 1>(p, st);
  });
}

FISNET_LAUNCHER(phi_scale, launch_phi_scale);
FISNET_LAUNCHER(phi_scale_backward, launch_phi_scale_backward);
FISNET_KERNEL(phi_scale_kernel<float, 4>);
FISNET_KERNEL(phi_scale_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(phi_scale_backward_kernel<float, 4>);
FISNET_KERNEL(phi_scale_backward_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(phi_scale_bn_backward_kernel<float, 4>);
FISNET_KERNEL(phi_scale_bn_backward_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
