// The adjoint of a transposed product and of the phi before it, in one pass. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct FpropAdjointParams {
  DType dtype;
  LinearMap map;        // samples = N K
  int maps;             // K
  TileShape tile;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [N] relative epsilon, or null
  const void* g_bar;    // [N K, height, width, c_in]
  const void* W;        // [c_out, kernel_y, kernel_x, c_in], without BatchNorm's scale
  const void* factor;   // [c_out] accumulation type: BatchNorm's scale; or null (1)
  const void* a;        // [N, out_height, out_width, c_out], >= 0
  const void* s;        // [N K, out_height, out_width, c_out]; null when neither a_bar nor factor_bar is wanted
  const void* join;     // [N K, out_height, out_width, c_out] or null
  void* g_bar_out;      // [N K, out_height, out_width, c_out]
  void* a_bar;          // [N, out_height, out_width, c_out] or null
  void* partial;        // [rows / 64, rounded up, c_out] accumulation type, or null; with factor_bar
  void* factor_bar;     // [c_out] accumulation type, or null

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("maps", maps)); f(field("tile", tile));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("g_bar", g_bar)); f(field("W", W)); f(field("factor", factor));
    f(field("a", a)); f(field("s", s)); f(field("join", join)); f(field("g_bar_out", g_bar_out)); f(field("a_bar", a_bar));
    f(field("partial", partial)); f(field("factor_bar", factor_bar));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_fprop_adjoint(const FpropAdjointParams& p, void* stream);
}  // namespace fisnet
