// What the forward and the z+ rule need of a linear map, side by side. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct DualFpropParams {
  DType dtype;
  LinearMap map;           // samples = N
  TileShape tile;
  const void* x;           // [N, height, width, c_in]
  const void* W;           // [c_out, kernel_y, kernel_x, c_in]
  const void* sign;        // [c_out] accumulation type, of -1, 0, 1; or null: all 1
  const void* shift;       // [c_out] accumulation type, or null
  const void* shift_plus;  // [c_out] accumulation type, or null
  void* z;                 // [N, out_height, out_width, c_out]
  void* P;                 // [N, out_height, out_width, c_out]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("tile", tile)); f(field("x", x)); f(field("W", W)); f(field("sign", sign));
    f(field("shift", shift)); f(field("shift_plus", shift_plus)); f(field("z", z)); f(field("P", P));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_dual_fprop(const DualFpropParams& p, void* stream);
}  // namespace fisnet
