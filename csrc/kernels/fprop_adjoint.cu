// The adjoint of g -> s = phi(a) g -> W~^T s, W~ = factor W, at g_bar of its result:
//
//   u = W g_bar;  s_bar = factor u + join
//   g_bar' = a / (a + e) s_bar;  a_bar = sum_k e / (a + e) (s / a) s_bar;  factor_bar = sum over rows of s u
//
// The product in tensor cores (device/product.cuh), the rest while it is still in registers. A block leaves its rows' share of
// factor_bar in `partial`, added in order afterwards. Deterministic.
#include "fprop_adjoint.h"

#include "../device/channels.cuh"
#include "../device/phi.cuh"
#include "../device/tiles.cuh"

namespace fisnet {
namespace {
template <typename T> struct AdjointEpilogue {
  using A = Acc<T>;
  static constexpr int kSums = 1;
  double eps;
  const T* eps_n;
  const A* factor;
  const T* a;
  const T* s;
  const T* join;
  T* g_bar;
  T* a_bar;  // of one map; null with several

  template <int W> struct Fetched {
    Raw<T, W> a, s, join;
    A eps;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.a.fetch(a, at.act);
    f.s.fetch(s, at.at);
    f.join.fetch(join, at.at);
    f.eps = eps_of<T>(eps, eps_n, at.sample);
    return f;
  }
  template <int W> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&u)[1][W], A (&sum)[W]) const {
    Raw<T, W> g_out, a_out;
    A times[W];
    columns_of<W>(times, factor, at.column, A(1));
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      const PhiAdjoint<A> adjoint(f.a[i], f.eps, f.s[i], u[0][i] * times[i] + f.join[i]);
      g_out.set(i, adjoint.g_bar);
      a_out.set(i, adjoint.a_bar);
      sum[i] += f.s[i] * u[0][i];
    }
    g_out.put(g_bar, at.at);
    a_out.put(a_bar, at.act);
  }
};

// a_bar = sum_k e (g_bar'_k / a) (s_k / a): of several maps, whose rows different blocks have made. g_bar' / a is s_bar / (a + e),
// so what the product left behind is enough, and nothing else need be kept for this. 0 where the unit is dead, or without e.
// A thread owns W elements of every gridDim.y-th sample, and all K maps. Accumulates in float32 (float64 for float64). No shared
// memory. Deterministic.
template <typename T, int W> __global__ void __launch_bounds__(kMapThreads, 4) maps_adjoint_kernel(FpropAdjointParams p, Maps shape) {
  using A = Acc<T>;
  each_vector<W>(shape.size, [&](int64_t at, auto width) {
    constexpr int kWidth = decltype(width)::value;
    for (int64_t n = blockIdx.y; n < shape.samples; n += gridDim.y) {
      const Raw<T, kWidth> a = fetch<kWidth>(static_cast<const T*>(p.a), n * shape.size + at);
      const A e = eps_of<T>(p.eps, p.eps_n, n);
      A sum[kWidth] = {};
      int64_t j = n * shape.maps * shape.size + at;
      for (int k = 0; k < shape.maps; ++k, j += shape.size) {
        const Raw<T, kWidth> s = fetch<kWidth>(static_cast<const T*>(p.s), j), g_bar = fetch<kWidth>(static_cast<const T*>(p.g_bar_out), j);
        FISNET_UNROLL
        for (int i = 0; i < kWidth; ++i) {
          const Divisor<A> over(denominator(a[i], A(0)));
          sum[i] += over(s[i]) * (e * over(e == A(0) ? A(0) : g_bar[i]));
        }
      }
      Raw<T, kWidth> total;
      FISNET_UNROLL
      for (int i = 0; i < kWidth; ++i) total.set(i, sum[i]);
      put(static_cast<T*>(p.a_bar), n * shape.size + at, total);
    }
  });
}

template <typename T> int run(const FpropAdjointParams& p, cudaStream_t stream) {
  using A = Acc<T>;
  const ProductOperands operands{p.map, p.maps, p.g_bar, nullptr, p.W, nullptr, nullptr, nullptr};
  const bool several = p.a_bar && p.maps > 1, is_wide = wide<T>(p.map, p.g_bar, p.W, p.factor, p.a, p.s, p.join, p.g_bar_out, p.a_bar);
  const void* const s = several && !p.factor_bar ? nullptr : p.s;  // then only the second kernel reads it
  const AdjointEpilogue<T> epilogue{
      p.eps, static_cast<const T*>(p.eps_n), static_cast<const A*>(p.factor), static_cast<const T*>(p.a), static_cast<const T*>(s),
      static_cast<const T*>(p.join), static_cast<T*>(p.g_bar_out), several ? nullptr : static_cast<T*>(p.a_bar)};
  int error = launch_tile<T, Forward>(p.tile, is_wide, operands, epilogue, p.partial, stream);
  if (!error && p.factor_bar) {
    const int tiles = row_tiles(p.map, false, tile_rows(effective_shape<T>(p.tile, is_wide)));
    error = finish_channel_sums<A>(p.partial, p.factor_bar, tiles, p.map.c_out, stream);
  }
  if (!error && several) {
    const Maps shape{p.map.samples / p.maps, p.maps, static_cast<int64_t>(p.map.out_height) * p.map.out_width * p.map.c_out};
    const auto kernel = is_wide ? maps_adjoint_kernel<T, kVec<T>> : maps_adjoint_kernel<T, 1>;
    error = static_cast<int>(launch(kernel, map_grid(shape, is_wide ? kVec<T> : 1), dim3(kMapThreads), 0, stream, p, shape));
  }
  return error;
}
}  // namespace

int launch_fprop_adjoint(const FpropAdjointParams& p, void* stream) {
  return with_type(p.dtype, [&](auto tag) { return run<typename decltype(tag)::type>(p, static_cast<cudaStream_t>(stream)); });
}

FISNET_LAUNCHER(fprop_adjoint, launch_fprop_adjoint);
FISNET_KERNEL(linear_kernel<float, Tile128x128, 1, Forward, AdjointEpilogue<float>>);
FISNET_KERNEL(linear_kernel<__nv_bfloat16, Tile128x128, 1, Forward, AdjointEpilogue<__nv_bfloat16>>);
FISNET_KERNEL(maps_adjoint_kernel<float, 4>);
FISNET_KERNEL(maps_adjoint_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
