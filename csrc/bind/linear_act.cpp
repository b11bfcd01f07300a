#include "../kernels/linear_act.h"

#include "linear.h"

namespace fisnet {
namespace {
Tensor linear_act(
    const Tensor& x,             // [N, C_in, H, W] channels_last
    const Tensor& W,             // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    const OptTensor& scale,      // [C_out]
    const OptTensor& shift,      // [C_out]
    const OptTensor& skip,       // [N, C_out, P, Q] channels_last
    bool relu,
    const OptTensor& pre_scale,  // [C_in]
    const OptTensor& pre_shift,  // [C_in]
    int64_t tile,
    bool poison) {               // -> y [N, C_out, P, Q]
  const char* op = "linear_act";
  LinearActParams p{};
  p.dtype = dtype_of(x, op);
  check_nhwc(op, "x", x);
  check_like(op, "W", W, x);
  const int64_t samples = x.size(0), height = x.size(2), width = x.size(3);
  p.map = linear_map(op, W, samples, height, width, FISNET_GEOMETRY);
  const int64_t c_out = p.map.c_out, out_height = p.map.out_height, out_width = p.map.out_width;
  check_map(op, "x", x, x, samples, p.map.c_in, height, width);
  check_map(op, "skip", skip, x, samples, c_out, out_height, out_width);
  check_vector(op, "scale", scale, c_out, x);
  check_vector(op, "shift", shift, c_out, x);
  check_vector(op, "pre_scale", pre_scale, p.map.c_in, x);
  check_vector(op, "pre_shift", pre_shift, p.map.c_in, x);
  STD_TORCH_CHECK(pre_scale.has_value() == pre_shift.has_value(), op, ": pre_scale and pre_shift come together");
  p.relu = relu;
  p.tile = tile_shape(op, tile);
  STD_TORCH_CHECK(!pre_scale.has_value() || p.tile != TileShape::t128x128, op, ": the largest tile shape has no pre_scale");

  Launch run(op, x);
  Tensor y = new_map(x, samples, c_out, out_height, out_width, poison);
  p.x = run.in(x); p.W = run.in(W); p.scale = run.in(scale); p.shift = run.in(shift); p.skip = run.in(skip);
  p.pre_scale = run.in(pre_scale); p.pre_shift = run.in(pre_shift);
  p.y = run.out(y);
  run.done(launch_linear_act(p, run.stream()));
  return y;
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "linear_act(Tensor x, Tensor W, " FISNET_GEOMETRY_SCHEMA ", Tensor? scale, Tensor? shift, Tensor? skip, bool relu, Tensor? pre_scale, Tensor? pre_shift, "
      "int tile, bool poison=False) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("linear_act", TORCH_BOX(&fisnet::linear_act)); }
