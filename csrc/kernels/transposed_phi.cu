// g = W~^T s;  s' = a / (a + e) . (g + skip);  out = scale . s' + rest. The product in tensor cores (device/product.cuh), phi
// while it is still in registers.
#include "transposed_phi.h"

#include "../device/phi.cuh"
#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct PhiEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 0;
  double eps;
  const T* eps_n;
  const T* a;
  const T* skip;
  const A* scale;
  const T* rest;
  int rest_pitch;
  T* s;
  T* out;

  template <int W> struct Fetched {
    Raw<T, W> a, skip, rest;
    A eps;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.a.fetch(a, at.act);
    f.skip.fetch(skip, at.at);
    f.rest.fetch(rest, static_cast<int64_t>(at.row) * rest_pitch + at.column);
    f.eps = a ? eps_of<T>(eps, eps_n, at.sample) : A(0);
    return f;
  }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&g)[1][W], A (&)[W]) const {
    Raw<T, W> s_out, result;
    A factor[W];
    columns_of<W>(factor, scale, at.column, A(1));
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const A joined = g[0][i] + f.skip[i];
      const A x = a ? phi(gated(f.a[i], f.eps), f.eps) * joined : joined;
      s_out.set(i, x);
      result.set(i, x * factor[i] + f.rest[i]);
    }
    s_out.put(s, at.at);
    result.put(out, at.at);
  }
};

template <typename T> int run(const TransposedPhiParams& p, cudaStream_t stream) {
  using A = Acc<T>;
  const ProductOperands operands{p.map, p.maps, p.s, nullptr, p.W, nullptr, nullptr, nullptr};
  const PhiEpilogue<T> epilogue{
      p.eps, static_cast<const T*>(p.eps_n), static_cast<const T*>(p.a), static_cast<const T*>(p.skip), static_cast<const A*>(p.scale),
      static_cast<const T*>(p.rest), p.rest_pitch, static_cast<T*>(p.s_out), static_cast<T*>(p.out)};
  const bool is_wide = wide<T>(p.map, p.s, p.W, p.a, p.skip, p.scale, p.rest, p.s_out, p.out) && p.rest_pitch % kVec<T> == 0;
  return launch_tile<T, Transposed>(p.tile, is_wide, operands, epilogue, nullptr, stream);
}
}  // namespace

int launch_transposed_phi(const TransposedPhiParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(transposed_phi, launch_transposed_phi);
FISNET_KERNEL(linear_kernel<float, Tile128x128, 1, Transposed, PhiEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, Tile128x128, 1, Transposed, PhiEpilogue<__nv_bfloat16>>);
}  // namespace fisnet
