#include "../kernels/dual_fprop.h"

#include "linear.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor> dual_fprop(
    const Tensor& x,              // [N, C_in, H, W] channels_last
    const Tensor& W,              // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    const OptTensor& sign,        // [C_out]
    const OptTensor& shift,       // [C_out]
    const OptTensor& shift_plus,  // [C_out]
    int64_t tile,
    bool poison) {                // -> z [N, C_out, P, Q], P [N, C_out, P, Q]
  const char* op = "dual_fprop";
  DualFpropParams p{};
  p.dtype = dtype_of(x, op);
  check_like(op, "W", W, x);
  check_nhwc(op, "x", x);
  p.map = linear_map(op, W, x.size(0), x.size(2), x.size(3), FISNET_GEOMETRY);
  check_map(op, "x", x, x, x.size(0), p.map.c_in, p.map.height, p.map.width);
  check_vector(op, "sign", sign, p.map.c_out, x);
  check_vector(op, "shift", shift, p.map.c_out, x);
  check_vector(op, "shift_plus", shift_plus, p.map.c_out, x);
  p.tile = tile_shape(op, tile, true);

  Launch run(op, x);
  const auto result = [&] { return new_map(x, p.map.samples, p.map.c_out, p.map.out_height, p.map.out_width, poison); };
  Tensor z = result(), P = result();
  p.x = run.in(x); p.W = run.in(W); p.sign = run.in(sign); p.shift = run.in(shift); p.shift_plus = run.in(shift_plus);
  p.z = run.out(z); p.P = run.out(P);
  run.done(launch_dual_fprop(p, run.stream()));
  return {z, P};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("dual_fprop(Tensor x, Tensor W, " FISNET_GEOMETRY_SCHEMA ", Tensor? sign, Tensor? shift, Tensor? shift_plus, int tile, bool poison=False) -> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("dual_fprop", TORCH_BOX(&fisnet::dual_fprop)); }
