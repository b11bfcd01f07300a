// s_bar = W~ g_bar, s+_bar = W~+ g+_bar, W~+ = max(W~, 0); then the adjoint of both rules (device/dual_phi.cuh):
//
//   g_bar' = a / (a + e) s_bar                             g+_bar' = a u+,  u+ = s+_bar / (z+ + e+)
//   a_bar  = e / (a + e) (s / a) s_bar + (s+ / a) s+_bar   z+_bar  = -s+ u+
//
// Both products from one load of W~, in tensor cores (device/product.cuh), the adjoint while they are still in registers.
#include "dual_fprop_adjoint.h"

#include "../device/dual_phi.cuh"
#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct DualAdjointEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 0;
  double eps;
  const T* eps_n;
  double eps_plus;
  const T* a;
  const T* s;
  const T* s_plus;
  const T* z_plus;
  T* g_bar;
  T* g_plus_bar;
  T* a_bar;
  T* z_plus_bar;

  template <int W> struct Fetched {
    Raw<T, W> a, s, s_plus, z_plus;
    A eps;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.a.fetch(a, at.act);
    f.s.fetch(s, at.at);
    f.s_plus.fetch(s_plus, at.at);
    f.z_plus.fetch(z_plus, at.act);
    f.eps = eps_of<T>(eps, eps_n, at.sample);
    return f;
  }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&s_bar)[2][W], A (&)[W]) const {
    Raw<T, W> to_g, to_g_plus, to_a, to_z_plus;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const DualPhiAdjoint<A> unit(s_bar[0][i], s_bar[1][i], f.a[i], f.s[i], f.s_plus[i], f.z_plus[i], f.eps, static_cast<A>(eps_plus));
      to_g.set(i, unit.g_bar);
      to_g_plus.set(i, unit.g_plus_bar);
      to_a.set(i, unit.a_bar);
      to_z_plus.set(i, unit.z_plus_bar);
    }
    to_g.put(g_bar, at.at);
    to_g_plus.put(g_plus_bar, at.at);
    to_a.put(a_bar, at.at);
    to_z_plus.put(z_plus_bar, at.at);
  }
};

template <typename T> int run(const DualFpropAdjointParams& p, cudaStream_t stream) {
  const ProductOperands operands{p.map, 1, p.g_bar, p.g_plus_bar, p.W, nullptr, nullptr, nullptr};
  const DualAdjointEpilogue<T> epilogue{
      p.eps, static_cast<const T*>(p.eps_n), p.eps_plus, static_cast<const T*>(p.a), static_cast<const T*>(p.s), static_cast<const T*>(p.s_plus),
      static_cast<const T*>(p.z_plus), static_cast<T*>(p.out), static_cast<T*>(p.out_plus), static_cast<T*>(p.a_bar), static_cast<T*>(p.z_plus_bar)};
  const bool is_wide = wide<T>(p.map, p.g_bar, p.g_plus_bar, p.W, p.a, p.s, p.s_plus, p.z_plus, p.out, p.out_plus, p.a_bar, p.z_plus_bar);
  return launch_tile<T, ForwardPair>(p.tile, is_wide, operands, epilogue, nullptr, stream);
}
}  // namespace

int launch_dual_fprop_adjoint(const DualFpropAdjointParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(dual_fprop_adjoint, launch_dual_fprop_adjoint);
FISNET_KERNEL(linear_kernel<float, PairTile128x64, 1, ForwardPair, DualAdjointEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, PairTile128x64, 1, ForwardPair, DualAdjointEpilogue<__nv_bfloat16>>);
}  // namespace fisnet
