// The products of device/product.cuh by themselves: results, their column sums, and what stands beside a result (an activation's
// element, a value a sample). Compiled for a few cases of test_product.py at a time, also over changed copies of product.cuh:
//
//   -DCASES="CASE(name, element, tile, 16-byte access, product) ..."
#include "registry.h"
#include "tiles.cuh"

namespace fisnet {
namespace {
struct CaseParams {
  LinearMap map;
  int maps;
  const void* A;           // forward: [samples, height, width, c_in]; transposed: [samples, out_height, out_width, c_out]
  const void* A_plus;      // the same; with two operands
  const void* W;           // [c_out, kernel_y, kernel_x, c_in]
  const void* sign;        // [c_out] accumulation type, or null
  const void* pre_scale;   // [c_in] accumulation type; with the prologue
  const void* pre_shift;   // [c_in] accumulation type
  const void* beside;      // [samples / maps, ...] like a result, or null: added to the first product
  const void* per_sample;  // [samples / maps] or null: added to the last product
  void* first;             // the first product
  void* last;              // the last product
  void* sums;              // [row tiles, columns] accumulation type, or null: of the last product

  template <class F> void each(F&& f) {
    map.each(f); f(field("maps", maps)); f(field("A", A)); f(field("A_plus", A_plus)); f(field("W", W)); f(field("sign", sign));
    f(field("pre_scale", pre_scale)); f(field("pre_shift", pre_shift)); f(field("beside", beside)); f(field("per_sample", per_sample));
    f(field("first", first)); f(field("last", last)); f(field("sums", sums));
  }
};

template <typename T> struct Plain {
  using A = Acc<T>;
  static constexpr int kSums = 1;
  const T* beside;
  const T* per_sample;
  T* first;
  T* last;

  template <int W> struct Fetched {
    Raw<T, W> beside;
    A sample;
  };
  template <int W> __device__ __forceinline__ Fetched<W> fetch(const Place& at) const {
    Fetched<W> f;
    f.beside.fetch(beside, at.act);
    f.sample = per_sample ? to_acc(per_sample[at.sample]) : A(0);
    return f;
  }
  template <int W, int P> __device__ __forceinline__ void finish(const Fetched<W>& f, const Place& at, const A (&v)[P][W], A (&sum)[W]) const {
    Raw<T, W> x, y;
    for (int i = 0; i < W; ++i) {
      x.set(i, v[0][i] + f.beside[i]);
      y.set(i, v[P - 1][i] + f.sample);
      sum[i] += v[P - 1][i];
    }
    x.put(first, at.at);
    y.put(last, at.at);
  }
};

template <typename T, typename Tile, int kWide, typename Product> int run(const CaseParams& p, void* stream) {
  const ProductOperands operands{p.map, p.maps, p.A, p.A_plus, p.W, p.sign, p.pre_scale, p.pre_shift};
  const Plain<T> epilogue{static_cast<const T*>(p.beside), static_cast<const T*>(p.per_sample), static_cast<T*>(p.first), static_cast<T*>(p.last)};
  return launch_linear<T, Tile, kWide, Product>(operands, epilogue, p.sums, static_cast<cudaStream_t>(stream));
}

#define CASE(name, T, Tile, kWide, Product) [[maybe_unused]] const bool name##_is_there = add_launcher(#name, run<T, Tile, kWide, Product>);
CASES
}  // namespace
}  // namespace fisnet
