// y = [relu](scale . W x' + shift + skip);  x' = relu(pre_scale x + pre_shift), rounded to x's type, or x itself. The product in
// tensor cores (device/product.cuh), the rest while it is still in registers; x' is made on the way to shared memory.
#include "linear_act.h"

#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct ActEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 0;
  const A* scale;
  const A* shift;
  const T* skip;
  T* y;
  bool relu;

  template <int W> struct Fetched {
    Raw<T, W> skip;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.skip.fetch(skip, at.at);
    return f;
  }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&z)[1][W], A (&)[W]) const {
    Raw<T, W> out;
    A times[W], plus[W];
    columns_of<W>(times, scale, at.column, A(1));
    columns_of<W>(plus, shift, at.column, A(0));
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const A v = z[0][i] * times[i] + plus[i] + f.skip[i];
      out.set(i, relu ? rectified(v) : v);
    }
    out.put(y, at.at);
  }
};

template <typename T> int run(const LinearActParams& p, cudaStream_t stream) {
  using A = Acc<T>;
  const ProductOperands operands{p.map, 1, p.x, nullptr, p.W, nullptr, p.pre_scale, p.pre_shift};
  const ActEpilogue<T> epilogue{static_cast<const A*>(p.scale), static_cast<const A*>(p.shift), static_cast<const T*>(p.skip), static_cast<T*>(p.y), p.relu};
  const bool is_wide = wide<T>(p.map, p.x, p.W, p.scale, p.shift, p.skip, p.pre_scale, p.pre_shift, p.y);
  if (p.pre_scale) return launch_tile<T, ForwardPrologue>(p.tile, is_wide, operands, epilogue, nullptr, stream);
  return launch_tile<T, Forward>(p.tile, is_wide, operands, epilogue, nullptr, stream);
}
}  // namespace

int launch_linear_act(const LinearActParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(linear_act, launch_linear_act);
FISNET_KERNEL(linear_kernel<float, Tile128x128, 1, Forward, ActEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, Tile128x128, 1, Forward, ActEpilogue<__nv_bfloat16>>);
FISNET_KERNEL(linear_kernel<float, Tile128x64, 1, ForwardPrologue, ActEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, Tile128x64, 1, ForwardPrologue, ActEpilogue<__nv_bfloat16>>);
}  // namespace fisnet
