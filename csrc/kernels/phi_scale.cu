#include "phi_scale.h"

#include "../device/channels.cuh"
#include "../device/divide.cuh"
#include "../device/maps.cuh"
#include "../device/phi.cuh"

namespace fisnet {
namespace {
// V vectors of W elements of one sample's activation, and all K maps over them, so `a` is read once. The next map is on its
// way while one is stored; phi is made anew for every map, which is cheaper than the registers to keep it.
template <typename T, int W, int V, bool kJoined, bool kScaled>
__device__ __forceinline__ void phi_scale_at(const PhiScaleParams& p, int64_t n, int64_t at) {
  using A = Acc<T>;
  constexpr int64_t kStep = kMapThreads * W;
  Raw<T, W> a[V], g[V], skip[V], rest[V];
  int64_t j = n * p.shape.maps * p.shape.size + at;
  const auto fetch_map = [&] {
    FISNET_UNROLL
    for (int v = 0; v < V; ++v) {
      g[v].fetch(static_cast<const T*>(p.g), j + v * kStep);
      if constexpr (kJoined) skip[v].fetch(static_cast<const T*>(p.skip), j + v * kStep);
      if constexpr (kScaled) rest[v].fetch(static_cast<const T*>(p.rest), j + v * kStep);
    }
  };
  FISNET_UNROLL
  for (int v = 0; v < V; ++v) a[v].fetch(static_cast<const T*>(p.a), n * p.shape.size + at + v * kStep);
  fetch_map();

  const A e = eps_of<T>(p.eps, p.eps_n, n);
  for (int k = 0; k < p.shape.maps; ++k) {
    Raw<T, W> s[V], out[V];
    FISNET_UNROLL
    for (int v = 0; v < V; ++v) {
      a[v].renew();
      A scale[W];
      if constexpr (kScaled) channel_values<W>(scale, static_cast<const A*>(p.scale), p.planes, at + v * kStep);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        const A x = phi(gated(a[v][i], e), e) * (kJoined ? g[v][i] + skip[v][i] : g[v][i]);
        s[v].set(i, x);
        if constexpr (kScaled) out[v].set(i, x * scale[i] + rest[v][i]);
      }
    }
    const int64_t to = j;
    j += p.shape.size;
    if (k + 1 < p.shape.maps) fetch_map();
    FISNET_UNROLL
    for (int v = 0; v < V; ++v) {
      put(static_cast<T*>(p.s), to + v * kStep, s[v]);
      if constexpr (kScaled) put(static_cast<T*>(p.out), to + v * kStep, out[v]);
    }
  }
}

// s = a / (a + e) . (g + skip);  out = scale . s + rest.
// A thread owns V vectors of W elements of every gridDim.y-th sample. Accumulates in float32 (float64 for float64). No
// shared memory. Deterministic.
template <typename T, int W, int V, bool kJoined, bool kScaled>
__global__ void __launch_bounds__(kMapThreads, V > 1 ? 3 : 4) phi_scale_kernel(PhiScaleParams p) {
  for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
    each_tile<W, V>(p.shape.size, [&](int64_t at, auto width, auto vectors) {
      phi_scale_at<T, decltype(width)::value, decltype(vectors)::value, kJoined, kScaled>(p, n, at);
    });
  }
}

// One vector of the adjoint, all K maps, with s_bar + join for s_bar: g_bar = a / (a + e) scale s_bar;  a_bar = sum_k e / (a + e) (s / a) scale s_bar.
// Adds <s_bar, s> to `dot` with a scale.
// The divisions by one activation are made anew for every map: that is cheaper than the registers to keep them.
// `n` is the sample, `at` its place in the activations, `j` that in the first map.
template <typename T, int W, bool kScaled, bool kOneMap>
__device__ __forceinline__ void phi_scale_adjoint(const PhiScaleBackwardParams& p, int64_t n, int64_t at, int64_t j, const Acc<T> (&scale)[W], Acc<T> (&dot)[W]) {
  using A = Acc<T>;
  Raw<T, W> a = fetch<W>(static_cast<const T*>(p.a), at);
  Raw<T, W> s_bar = fetch<W>(static_cast<const T*>(p.s_bar), j), join = fetch<W>(static_cast<const T*>(p.join), j);
  Raw<T, W> s = fetch<W>(static_cast<const T*>(p.s), j);
  const A e = eps_of<T>(p.eps, p.eps_n, n);
  A a_bar[W] = {};
  const int maps = kOneMap ? 1 : p.shape.maps;
  for (int k = 0; k < maps; ++k) {
    Raw<T, W> g_bar;
    a.renew();
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const A given = s_bar[i] + join[i];
      if constexpr (kScaled) dot[i] += given * s[i];
      const PhiAdjoint<A> adjoint(a[i], e, s[i], kScaled ? scale[i] * given : given);
      g_bar.set(i, adjoint.g_bar);
      a_bar[i] += adjoint.a_bar;
    }
    j += p.shape.size;
    if (k + 1 < maps) {
      s_bar = fetch<W>(static_cast<const T*>(p.s_bar), j);
      join = fetch<W>(static_cast<const T*>(p.join), j);
      s = fetch<W>(static_cast<const T*>(p.s), j);
    }
    put(static_cast<T*>(p.g_bar), j - p.shape.size, g_bar);
  }
  if (p.a_bar) {
    Raw<T, W> total;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) total.set(i, a_bar[i]);
    put(static_cast<T*>(p.a_bar), at, total);
  }
}

// The adjoint without scale: a thread owns W elements of every gridDim.y-th sample. No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 3) phi_scale_backward_kernel(PhiScaleBackwardParams p) {
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    Acc<T> unused[kWidth];
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      const int64_t first = n * p.shape.size;
      phi_scale_adjoint<T, kWidth, false, false>(p, n, first + at, first * p.shape.maps + at, unused, unused);
    }
  });
}

// The adjoint with scale: blocks own channels, as in device/channels.cuh, and leave <s_bar, s> a channel in `partial`.
// Shared memory: one accumulation value an element of the block's vectors, for the reduction. Deterministic.
template <typename T, int W, bool kOneMap>
__global__ void __launch_bounds__(ChannelGrid::kThreads, kOneMap ? 3 : 2) phi_scale_bn_backward_kernel(PhiScaleBackwardParams p) {
  using A = Acc<T>;
  A dot[1][W] = {};
  const uint32_t pixels = static_cast<uint32_t>(p.shape.size) / static_cast<uint32_t>(p.planes.channels);  // of one of several samples
  each_of_channel<W>(p.planes, [&](uint32_t position, int64_t offset, int c) {
    A scale[W];
    values_of_channel(scale, static_cast<const A*>(p.scale), p.planes, c);
    const int64_t n = p.shape.samples == 1 ? 0 : position / pixels, before = n * (p.shape.maps - 1) * p.shape.size;
    phi_scale_adjoint<T, W, true, kOneMap>(p, n, offset, offset + before, scale, dot[0]);
  });
  if (p.partial) store_channel_partials<1, W>(p.planes, dot, static_cast<A*>(p.partial));
}

template <typename T, int W>
int forward(const PhiScaleParams& p, cudaStream_t stream) {
  constexpr int kVectors = std::is_same_v<T, double> ? 1 : W > 1 ? 2 : 4;  // loads in flight; with scale there are enough
  constexpr int kScaledVectors = W > 1 ? 1 : kVectors;
  const auto kernel = p.scale ? (p.skip ? phi_scale_kernel<T, W, kScaledVectors, true, true> : phi_scale_kernel<T, W, kScaledVectors, false, true>)
                              : (p.skip ? phi_scale_kernel<T, W, kVectors, true, false> : phi_scale_kernel<T, W, kVectors, false, false>);
  const int width = W * (p.scale ? kScaledVectors : kVectors);
  return static_cast<int>(launch(kernel, map_grid(p.shape, width), dim3(kMapThreads), 0, stream, p));
}

template <typename T, int W>
int backward(const PhiScaleBackwardParams& p, cudaStream_t stream) {
  if (!p.scale) {
    return static_cast<int>(launch(phi_scale_backward_kernel<T, W>, map_grid(p.shape, W), dim3(kMapThreads), 0, stream, p));
  }
  const ChannelGrid g = ChannelGrid::of(p.planes, W);
  const dim3 grid(static_cast<unsigned>(g.tiles), static_cast<unsigned>(p.slabs)), block(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y));
  const auto kernel = p.shape.maps == 1 ? phi_scale_bn_backward_kernel<T, W, true> : phi_scale_bn_backward_kernel<T, W, false>;
  const int error = static_cast<int>(launch(kernel, grid, block, 0, stream, p));
  if (error || !p.scale_bar) return error;
  return finish_channel_sums<Acc<T>>(p.partial, p.scale_bar, p.slabs, p.planes.channels, stream);
}
}  // namespace

int launch_phi_scale(const PhiScaleParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && (!p.scale || channel_vectors(p.planes, kVec<T>)) && aligned16(p.g, p.a, p.skip, p.scale, p.rest, p.s, p.out);
    return wide ? forward<T, kVec<T>>(p, st) : forward<T, 1>(p, st);
  });
}

int launch_phi_scale_backward(const PhiScaleBackwardParams& p, void* stream) {
  if (p.shape.samples * p.shape.maps * p.shape.size == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && (!p.scale || p.planes.vectors(kVec<T>)) && aligned16(p.s_bar, p.join, p.s, p.a, p.scale, p.g_bar, p.a_bar);
    return wide ? backward<T, kVec<T>>(p, st) : backward<T, 1>(p, st);
  });
}

FISNET_LAUNCHER(phi_scale, launch_phi_scale);
FISNET_LAUNCHER(phi_scale_backward, launch_phi_scale_backward);
FISNET_KERNEL(phi_scale_kernel<float, 4, 2, false, false>);
FISNET_KERNEL(phi_scale_kernel<__nv_bfloat16, 8, 2, false, false>);
FISNET_KERNEL(phi_scale_kernel<float, 4, 1, true, true>);
FISNET_KERNEL(phi_scale_kernel<__nv_bfloat16, 8, 1, true, true>);
FISNET_KERNEL(phi_scale_backward_kernel<float, 4>);
FISNET_KERNEL(phi_scale_backward_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(phi_scale_bn_backward_kernel<float, 4, true>);
FISNET_KERNEL(phi_scale_bn_backward_kernel<__nv_bfloat16, 8, true>);
}  // namespace fisnet
