// z = W x + shift;  P = W+ x + shift+,  W+ = max(sign W, 0). Both products from one load of x and of W (device/product.cuh).
#include "dual_fprop.h"

#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct ShiftsEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 0;
  const A* shift;
  const A* shift_plus;
  T* z;
  T* P;

  template <int W> struct Fetched {};
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place&) const { return {}; }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>&, const Place& at, const A (&v)[2][W], A (&)[W]) const {
    put(z, at.at, shifted<W>(v[0], shift, at.column));
    put(P, at.at, shifted<W>(v[1], shift_plus, at.column));
  }
  template <int W> static __device__ __forceinline__ Raw<T, W> shifted(const A (&v)[W], const A* by, int column) {
    A shifts[W];
    columns_of<W>(shifts, by, column, A(0));
    Raw<T, W> result;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) result.set(i, v[i] + shifts[i]);
    return result;
  }
};

template <typename T> int run(const DualFpropParams& p, cudaStream_t stream) {
  using A = Acc<T>;
  const ProductOperands operands{p.map, 1, p.x, nullptr, p.W, p.sign, nullptr, nullptr};
  const ShiftsEpilogue<T> epilogue{static_cast<const A*>(p.shift), static_cast<const A*>(p.shift_plus), static_cast<T*>(p.z), static_cast<T*>(p.P)};
  return launch_tile<T, ForwardDual>(p.tile, wide<T>(p.map, p.x, p.W, p.shift, p.shift_plus, p.z, p.P), operands, epilogue, nullptr, stream);
}
}  // namespace

int launch_dual_fprop(const DualFpropParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(dual_fprop, launch_dual_fprop);
FISNET_KERNEL(linear_kernel<float, PairTile128x64, 1, ForwardDual, ShiftsEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, PairTile128x64, 1, ForwardDual, ShiftsEpilogue<__nv_bfloat16>>);
}  // namespace fisnet
