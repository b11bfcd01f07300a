// LRP through a linear map and the ReLU before it: transposed product, then phi. Torch-free.
#pragma once
#include "../device/linear.h"

namespace fisnet {
struct TransposedPhiParams {
  DType dtype;
  LinearMap map;        // samples = N K
  int maps;             // K
  TileShape tile;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [N] relative epsilon, or null
  const void* s;        // [N K, out_height, out_width, c_out]
  const void* W;        // [c_out, kernel_y, kernel_x, c_in], BatchNorm's scale folded in
  const void* a;        // [N, height, width, c_in], >= 0; or null: phi = 1
  const void* skip;     // [N K, height, width, c_in] or null
  const void* scale;    // [c_in] accumulation type, or null
  const void* rest;     // [N K, height, width, rest_pitch] or null: the first c_in channels of a larger map count; with scale
  int rest_pitch;       // channels from one position of rest to the next, c_in when it is a map of its own
  void* s_out;          // [N K, height, width, c_in]; null when scale is given and it need not be kept
  void* out;            // [N K, height, width, c_in]; null without scale

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); map.each(f); f(field("maps", maps)); f(field("tile", tile));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("s", s)); f(field("W", W)); f(field("a", a)); f(field("skip", skip));
    f(field("scale", scale)); f(field("rest", rest)); f(field("rest_pitch", rest_pitch)); f(field("s_out", s_out)); f(field("out", out));
  }
};

// Returns a cudaError_t. `stream` is a cudaStream_t.
int launch_transposed_phi(const TransposedPhiParams& p, void* stream);
}  // namespace fisnet
