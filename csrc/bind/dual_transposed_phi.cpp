#include "../kernels/dual_transposed_phi.h"

#include "linear.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor> dual_transposed_phi(
    const Tensor& s,         // [N, C_out, P, Q] channels_last
    const Tensor& s_plus,    // [N, C_out, P, Q] channels_last
    const Tensor& W,         // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    int64_t height,
    int64_t width,
    const OptTensor& a,      // [N, C_in, H, W] channels_last
    const OptTensor& z_plus,  // [N, C_in, H, W] channels_last
    double eps,
    const OptTensor& eps_n,  // [N]
    double eps_plus,
    int64_t tile,
    bool poison) {           // -> s' [N, C_in, H, W], s+' [N, C_in, H, W]
  const char* op = "dual_transposed_phi";
  DualTransposedPhiParams p{};
  p.dtype = dtype_of(s, op);
  check_like(op, "W", W, s);
  const int64_t samples = s.dim() ? s.size(0) : 0, c_in = W.dim() > 1 ? W.size(1) : 0;
  p.map = linear_map(op, W, samples, height, width, FISNET_GEOMETRY);
  check_map(op, "s", s, s, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_map(op, "s_plus", s_plus, s, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  check_map(op, "a", a, s, samples, c_in, height, width);
  check_map(op, "z_plus", z_plus, s, samples, c_in, height, width);
  STD_TORCH_CHECK(a.has_value() == z_plus.has_value(), op, ": a and z_plus come together");
  STD_TORCH_CHECK(a.has_value() || !eps_n.has_value(), op, ": eps needs a");
  if (a.has_value()) check_eps(op, eps_n, *a);
  p.eps = eps;
  p.eps_plus = eps_plus;
  p.tile = tile_shape(op, tile, true);

  Launch run(op, s);
  Tensor out = new_map(s, samples, c_in, height, width, poison), out_plus = new_map(s, samples, c_in, height, width, poison);
  p.s = run.in(s); p.s_plus = run.in(s_plus); p.W = run.in(W); p.a = run.in(a); p.z_plus = run.in(z_plus); p.eps_n = run.in(eps_n);
  p.out = run.out(out); p.out_plus = run.out(out_plus);
  run.done(launch_dual_transposed_phi(p, run.stream()));
  return {out, out_plus};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "dual_transposed_phi(Tensor s, Tensor s_plus, Tensor W, " FISNET_GEOMETRY_SCHEMA ", int height, int width, Tensor? a, Tensor? z_plus, float eps, "
      "Tensor? eps_n, float eps_plus, int tile, bool poison=False) -> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("dual_transposed_phi", TORCH_BOX(&fisnet::dual_transposed_phi)); }
