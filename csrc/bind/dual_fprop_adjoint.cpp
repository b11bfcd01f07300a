#include "../kernels/dual_fprop_adjoint.h"

#include "linear.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor, Tensor, Tensor> dual_fprop_adjoint(
    const Tensor& g_bar,       // [N, C_in, H, W] channels_last
    const Tensor& g_plus_bar,  // [N, C_in, H, W] channels_last
    const Tensor& W,           // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    const Tensor& a,           // [N, C_out, P, Q] channels_last
    const Tensor& s,           // [N, C_out, P, Q] channels_last
    const Tensor& s_plus,      // [N, C_out, P, Q] channels_last
    const Tensor& z_plus,      // [N, C_out, P, Q] channels_last
    double eps,
    const OptTensor& eps_n,    // [N]
    double eps_plus,
    int64_t tile,
    bool poison) {             // -> g_bar', g_plus_bar', a_bar, z_plus_bar, each [N, C_out, P, Q]
  const char* op = "dual_fprop_adjoint";
  DualFpropAdjointParams p{};
  p.dtype = dtype_of(g_bar, op);
  check_like(op, "W", W, g_bar);
  check_nhwc(op, "g_bar", g_bar);
  const int64_t samples = g_bar.size(0);
  p.map = linear_map(op, W, samples, g_bar.size(2), g_bar.size(3), FISNET_GEOMETRY);
  check_map(op, "g_bar", g_bar, g_bar, samples, p.map.c_in, p.map.height, p.map.width);
  check_map(op, "g_plus_bar", g_plus_bar, g_bar, samples, p.map.c_in, p.map.height, p.map.width);
  check_map(op, "a", a, g_bar, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_map(op, "s", s, g_bar, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_map(op, "s_plus", s_plus, g_bar, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_map(op, "z_plus", z_plus, g_bar, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_eps(op, eps_n, a);
  p.eps = eps;
  p.eps_plus = eps_plus;
  p.tile = tile_shape(op, tile, true);

  Launch run(op, g_bar);
  const auto result = [&] { return new_map(g_bar, samples, p.map.c_out, p.map.out_height, p.map.out_width, poison); };
  Tensor out = result(), out_plus = result(), a_bar = result(), z_plus_bar = result();
  p.g_bar = run.in(g_bar); p.g_plus_bar = run.in(g_plus_bar); p.W = run.in(W); p.a = run.in(a); p.s = run.in(s); p.s_plus = run.in(s_plus);
  p.z_plus = run.in(z_plus); p.eps_n = run.in(eps_n);
  p.out = run.out(out); p.out_plus = run.out(out_plus); p.a_bar = run.out(a_bar); p.z_plus_bar = run.out(z_plus_bar);
  run.done(launch_dual_fprop_adjoint(p, run.stream()));
  return {out, out_plus, a_bar, z_plus_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "dual_fprop_adjoint(Tensor g_bar, Tensor g_plus_bar, Tensor W, " FISNET_GEOMETRY_SCHEMA ", Tensor a, Tensor s, Tensor s_plus, Tensor z_plus, float eps, "
      "Tensor? eps_n, float eps_plus, int tile, bool poison=False) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("dual_fprop_adjoint", TORCH_BOX(&fisnet::dual_fprop_adjoint)); }
