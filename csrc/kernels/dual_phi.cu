#include "dual_phi.h"

#include "../device/dual_phi.cuh"
#include "../device/maps.cuh"

namespace fisnet {
namespace {
// s, s+ of DualPhi (device/dual_phi.cuh).
// A thread owns W elements of every gridDim.y-th sample. Accumulates in float32 (float64 for float64). No shared memory.
// Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) dual_phi_kernel(DualPhiParams p) {
  using A = Acc<T>;
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      const int64_t j = n * p.shape.size + at;
      const Raw<T, kWidth> a = fetch<kWidth>(static_cast<const T*>(p.a), j), z_plus = fetch<kWidth>(static_cast<const T*>(p.z_plus), j);
      const Raw<T, kWidth> g = fetch<kWidth>(static_cast<const T*>(p.g), j), g_plus = fetch<kWidth>(static_cast<const T*>(p.g_plus), j);
      const A e = eps_of<T>(p.eps, p.eps_n, n), e_plus = static_cast<A>(p.eps_plus);
      Raw<T, kWidth> s, s_plus;
      FISNET_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const DualPhi<A> unit(g[i], g_plus[i], a[i], z_plus[i], e, e_plus);
        s.set(i, unit.s);
        s_plus.set(i, unit.s_plus);
      }
      put(static_cast<T*>(p.s), j, s);
      put(static_cast<T*>(p.s_plus), j, s_plus);
    }
  });
}

// Their adjoint: DualPhiAdjoint.
// A thread owns W elements of every gridDim.y-th sample. Accumulates in float32 (float64 for float64). No shared memory.
// Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 3) dual_phi_backward_kernel(DualPhiBackwardParams p) {
  using A = Acc<T>;
  each_vector<W>(p.shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t n = blockIdx.y; n < p.shape.samples; n += gridDim.y) {
      const int64_t j = n * p.shape.size + at;
      const Raw<T, kWidth> a = fetch<kWidth>(static_cast<const T*>(p.a), j), z_plus = fetch<kWidth>(static_cast<const T*>(p.z_plus), j);
      const Raw<T, kWidth> s_bar = fetch<kWidth>(static_cast<const T*>(p.s_bar), j), s_plus_bar = fetch<kWidth>(static_cast<const T*>(p.s_plus_bar), j);
      const Raw<T, kWidth> s = fetch<kWidth>(static_cast<const T*>(p.s), j), s_plus = fetch<kWidth>(static_cast<const T*>(p.s_plus), j);
      const A e = eps_of<T>(p.eps, p.eps_n, n), e_plus = static_cast<A>(p.eps_plus);
      Raw<T, kWidth> g_bar, g_plus_bar, a_bar, z_plus_bar;
      FISNET_UNROLL
      for (int i = 0; i < kWidth; ++i) {
        const DualPhiAdjoint<A> unit(s_bar[i], s_plus_bar[i], a[i], s[i], s_plus[i], z_plus[i], e, e_plus);
        g_bar.set(i, unit.g_bar);
        g_plus_bar.set(i, unit.g_plus_bar);
        a_bar.set(i, unit.a_bar);
        z_plus_bar.set(i, unit.z_plus_bar);
      }
      put(static_cast<T*>(p.g_bar), j, g_bar);
      put(static_cast<T*>(p.g_plus_bar), j, g_plus_bar);
      put(static_cast<T*>(p.a_bar), j, a_bar);
      put(static_cast<T*>(p.z_plus_bar), j, z_plus_bar);
    }
  });
}
}  // namespace

int launch_dual_phi(const DualPhiParams& p, void* stream) {
  if (p.shape.samples * p.shape.size == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && aligned16(p.g, p.g_plus, p.a, p.z_plus, p.s, p.s_plus);
    const auto kernel = wide ? dual_phi_kernel<T, kVec<T>> : dual_phi_kernel<T, 1>;
    return static_cast<int>(launch(kernel, map_grid(p.shape, wide ? kVec<T> : 1), dim3(kMapThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

int launch_dual_phi_backward(const DualPhiBackwardParams& p, void* stream) {
  if (p.shape.samples * p.shape.size == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.shape.vectors(kVec<T>) && aligned16(p.s_bar, p.s_plus_bar, p.a, p.s, p.s_plus, p.z_plus, p.g_bar, p.g_plus_bar, p.a_bar, p.z_plus_bar);
    const auto kernel = wide ? dual_phi_backward_kernel<T, kVec<T>> : dual_phi_backward_kernel<T, 1>;
    return static_cast<int>(launch(kernel, map_grid(p.shape, wide ? kVec<T> : 1), dim3(kMapThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

FISNET_LAUNCHER(dual_phi, launch_dual_phi);
FISNET_LAUNCHER(dual_phi_backward, launch_dual_phi_backward);
FISNET_KERNEL(dual_phi_kernel<float, 4>);
FISNET_KERNEL(dual_phi_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(dual_phi_backward_kernel<float, 4>);
FISNET_KERNEL(dual_phi_backward_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
