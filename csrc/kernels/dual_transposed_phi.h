// Both relevances of Dual through a linear map and the ReLU before it: two transposed products, then both rules. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct DualTransposedPhiParams {
  DType dtype;
  LinearMap map;       // samples = N
  TileShape tile;
  double eps;          // of the epsilon rule, absolute; used when eps_n is null
  const void* eps_n;   // [N] relative epsilon, or null
  double eps_plus;     // of the z+ rule
  const void* s;       // [N, out_height, out_width, c_out]
  const void* s_plus;  // [N, out_height, out_width, c_out]
  const void* W;       // [c_out, kernel_y, kernel_x, c_in], BatchNorm's scale folded in
  const void* a;       // [N, height, width, c_in], >= 0; or null: the products themselves
  const void* z_plus;  // [N, height, width, c_in], >= 0; with a
  void* out;           // [N, height, width, c_in]
  void* out_plus;      // [N, height, width, c_in]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("tile", tile)); f(field("eps", eps)); f(field("eps_n", eps_n));
    f(field("eps_plus", eps_plus)); f(field("s", s)); f(field("s_plus", s_plus)); f(field("W", W)); f(field("a", a));
    f(field("z_plus", z_plus)); f(field("out", out)); f(field("out_plus", out_plus));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_dual_transposed_phi(const DualTransposedPhiParams& p, void* stream);
}  // namespace fisnet
