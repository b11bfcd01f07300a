// The adjoint of Dual's step through a linear map, and of both rules at the ReLU before its input. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct DualFpropAdjointParams {
  DType dtype;
  LinearMap map;           // samples = N
  TileShape tile;
  double eps;              // of the epsilon rule, absolute; used when eps_n is null
  const void* eps_n;       // [N] relative epsilon, or null
  double eps_plus;         // of the z+ rule
  const void* g_bar;       // [N, height, width, c_in]
  const void* g_plus_bar;  // [N, height, width, c_in]
  const void* W;           // [c_out, kernel_y, kernel_x, c_in], BatchNorm's scale folded in
  const void* a;           // [N, out_height, out_width, c_out], >= 0
  const void* s;           // [N, out_height, out_width, c_out]
  const void* s_plus;      // [N, out_height, out_width, c_out]
  const void* z_plus;      // [N, out_height, out_width, c_out], >= 0
  void* out;               // [N, out_height, out_width, c_out], the gradient of what phi(a) multiplied
  void* out_plus;          // [N, out_height, out_width, c_out], of what a / (z+ + e+) multiplied
  void* a_bar;             // [N, out_height, out_width, c_out]
  void* z_plus_bar;        // [N, out_height, out_width, c_out]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("tile", tile)); f(field("eps", eps)); f(field("eps_n", eps_n));
    f(field("eps_plus", eps_plus)); f(field("g_bar", g_bar)); f(field("g_plus_bar", g_plus_bar)); f(field("W", W)); f(field("a", a));
    f(field("s", s)); f(field("s_plus", s_plus)); f(field("z_plus", z_plus)); f(field("out", out)); f(field("out_plus", out_plus));
    f(field("a_bar", a_bar)); f(field("z_plus_bar", z_plus_bar));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_dual_fprop_adjoint(const DualFpropAdjointParams& p, void* stream);
}  // namespace fisnet
