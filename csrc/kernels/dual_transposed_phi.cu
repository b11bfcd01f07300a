// g = W~^T s, g+ = W~+^T s+, W~+ = max(W~, 0);  s' = a / (a + e) . g,  s+' = a g+ / (z+ + e+), or g and g+ themselves.
// Both products from one load of W~, in tensor cores (device/product.cuh), the rules while they are still in registers.
#include "dual_transposed_phi.h"

#include "../device/dual_phi.cuh"
#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct DualPhiEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 0;
  double eps;
  const T* eps_n;
  double eps_plus;
  const T* a;
  const T* z_plus;
  T* s;
  T* s_plus;

  template <int W> struct Fetched {
    Raw<T, W> a, z_plus;
    A eps;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.a.fetch(a, at.act);
    f.z_plus.fetch(z_plus, at.act);
    f.eps = a ? eps_of<T>(eps, eps_n, at.sample) : A(0);
    return f;
  }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&g)[2][W], A (&)[W]) const {
    Raw<T, W> result, result_plus;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const DualPhi<A> unit(g[0][i], g[1][i], f.a[i], f.z_plus[i], f.eps, static_cast<A>(eps_plus));
      result.set(i, a ? unit.s : g[0][i]);
      result_plus.set(i, a ? unit.s_plus : g[1][i]);
    }
    result.put(s, at.at);
    result_plus.put(s_plus, at.at);
  }
};

template <typename T> int run(const DualTransposedPhiParams& p, cudaStream_t stream) {
  const ProductOperands operands{p.map, 1, p.s, p.s_plus, p.W, nullptr, nullptr, nullptr};
  const DualPhiEpilogue<T> epilogue{
      p.eps, static_cast<const T*>(p.eps_n), p.eps_plus, static_cast<const T*>(p.a), static_cast<const T*>(p.z_plus), static_cast<T*>(p.out), static_cast<T*>(p.out_plus)};
  return launch_tile<T, TransposedPair>(p.tile, wide<T>(p.map, p.s, p.s_plus, p.W, p.a, p.z_plus, p.out, p.out_plus), operands, epilogue, nullptr, stream);
}
}  // namespace

int launch_dual_transposed_phi(const DualTransposedPhiParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(dual_transposed_phi, launch_dual_transposed_phi);
FISNET_KERNEL(linear_kernel<float, PairTile128x64, 1, TransposedPair, DualPhiEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, PairTile128x64, 1, TransposedPair, DualPhiEpilogue<__nv_bfloat16>>);
}  // namespace fisnet
