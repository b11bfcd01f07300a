#include "../kernels/fprop_adjoint.h"

#include "linear.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor, Tensor> fprop_adjoint(
    const Tensor& g_bar,      // [N*K, C_in, H, W] channels_last
    const Tensor& W,          // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    const OptTensor& factor,  // [C_out]
    const Tensor& a,          // [N, C_out, P, Q] channels_last
    const Tensor& s,          // [N*K, C_out, P, Q] channels_last
    double eps,
    const OptTensor& eps_n,   // [N]
    const OptTensor& join,    // [N*K, C_out, P, Q] channels_last
    bool need_a,
    bool need_factor,
    int64_t tile,
    bool poison) {            // -> g_bar' [N*K, C_out, P, Q], a_bar [N, C_out, P, Q] or [0], factor_bar [C_out] or [0]
  const char* op = "fprop_adjoint";
  FpropAdjointParams p{};
  p.dtype = dtype_of(g_bar, op);
  check_nhwc(op, "g_bar", g_bar);
  check_like(op, "W", W, g_bar);
  const int64_t samples = g_bar.size(0), height = g_bar.size(2), width = g_bar.size(3);
  p.map = linear_map(op, W, samples, height, width, FISNET_GEOMETRY);
  const int64_t c_out = p.map.c_out, out_height = p.map.out_height, out_width = p.map.out_width, rows = samples * out_height * out_width;
  check_map(op, "g_bar", g_bar, g_bar, samples, p.map.c_in, height, width);
  STD_TORCH_CHECK(a.dim() == 4, op, ": a must be [N, C, H, W], got ", a.dim(), " axes");
  p.maps = maps_beside(op, samples, a);
  check_map(op, "a", a, g_bar, samples / p.maps, c_out, out_height, out_width);
  check_map(op, "s", s, g_bar, samples, c_out, out_height, out_width);
  check_map(op, "join", join, g_bar, samples, c_out, out_height, out_width);
  check_vector(op, "factor", factor, c_out, g_bar);
  check_eps(op, eps_n, a);
  STD_TORCH_CHECK(factor.has_value() || !need_factor, op, ": need_factor needs factor");
  p.eps = eps;
  p.tile = tile_shape(op, tile);

  Launch run(op, g_bar);
  Tensor g_bar_out = new_map(g_bar, samples, c_out, out_height, out_width, poison);
  Tensor a_bar = need_a ? new_map(g_bar, samples / p.maps, c_out, out_height, out_width, poison) : nothing(g_bar);
  Tensor factor_bar = need_factor ? acc_vector(g_bar, c_out) : nothing(g_bar);
  if (poison) torch::stable::fill_(factor_bar, std::numeric_limits<double>::quiet_NaN());
  const int64_t most_tiles = (rows + tile_rows(TileShape::t64x64) - 1) / tile_rows(TileShape::t64x64);  // of the smallest shape
  Tensor partial = need_factor ? acc_vector(g_bar, most_tiles * c_out) : nothing(g_bar);
  p.g_bar = run.in(g_bar); p.W = run.in(W); p.factor = run.in(factor); p.a = run.in(a); p.eps_n = run.in(eps_n); p.join = run.in(join);
  p.s = need_a || need_factor ? run.in(s) : nullptr;
  p.g_bar_out = run.out(g_bar_out); p.a_bar = run.out(a_bar); p.partial = run.out(partial); p.factor_bar = run.out(factor_bar);
  run.done(launch_fprop_adjoint(p, run.stream()));
  return {g_bar_out, a_bar, factor_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "fprop_adjoint(Tensor g_bar, Tensor W, " FISNET_GEOMETRY_SCHEMA ", Tensor? factor, Tensor a, Tensor s, float eps, Tensor? eps_n, Tensor? join, "
      "bool need_a, bool need_factor, int tile, bool poison=False) -> (Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("fprop_adjoint", TORCH_BOX(&fisnet::fprop_adjoint)); }
