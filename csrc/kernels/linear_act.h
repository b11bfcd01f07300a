// A linear map with what stands around it in a network: BatchNorm or bias, skip and ReLU behind it, BatchNorm and ReLU before. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct LinearActParams {
  DType dtype;
  LinearMap map;
  TileShape tile;           // with pre_scale not the largest
  bool relu;
  const void* x;            // [N, height, width, c_in]
  const void* W;            // [c_out, kernel_y, kernel_x, c_in]
  const void* scale;        // [c_out] accumulation type, or null (1)
  const void* shift;        // [c_out] accumulation type, or null (0)
  const void* skip;         // [N, out_height, out_width, c_out] or null
  const void* pre_scale;    // [c_in] accumulation type, or null: x as it is
  const void* pre_shift;    // [c_in] accumulation type; with pre_scale
  void* y;                  // [N, out_height, out_width, c_out]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("tile", tile)); f(field("relu", relu)); f(field("x", x)); f(field("W", W));
    f(field("scale", scale)); f(field("shift", shift)); f(field("skip", skip)); f(field("pre_scale", pre_scale));
    f(field("pre_shift", pre_shift)); f(field("y", y));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_linear_act(const LinearActParams& p, void* stream);
}  // namespace fisnet
