#include "../kernels/transposed_phi.h"

#include "linear.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor> transposed_phi(
    const Tensor& s,         // [N*K, C_out, P, Q] channels_last
    const Tensor& W,         // [C_out, C_in, R, S] channels_last
    FISNET_GEOMETRY_ARGS,
    int64_t height,
    int64_t width,
    const OptTensor& a,      // [N, C_in, H, W] channels_last
    double eps,
    const OptTensor& eps_n,  // [N]
    const OptTensor& skip,   // [N*K, C_in, H, W] channels_last
    const OptTensor& scale,  // [C_in]
    const OptTensor& rest,   // [N*K, C_in, H, W] channels_last, or some channels of such a map
    bool keep_s,
    int64_t tile,
    bool poison) {           // -> out [N*K, C_in, H, W], s' [N*K, C_in, H, W] or [0]
  const char* op = "transposed_phi";
  TransposedPhiParams p{};
  p.dtype = dtype_of(s, op);
  check_like(op, "W", W, s);
  const int64_t samples = s.dim() ? s.size(0) : 0, c_in = W.dim() > 1 ? W.size(1) : 0;
  p.map = linear_map(op, W, samples, height, width, FISNET_GEOMETRY);
  check_map(op, "s", s, s, samples, p.map.c_out, p.map.out_height, p.map.out_width);
  p.maps = a.has_value() ? maps_beside(op, samples, *a) : 1;
  check_map(op, "a", a, s, samples / p.maps, c_in, height, width);
  check_map(op, "skip", skip, s, samples, c_in, height, width);
  p.rest_pitch = static_cast<int>(c_in);
  if (rest.has_value()) p.rest_pitch = check_slice(op, "rest", *rest, s, samples, c_in, height, width);
  check_vector(op, "scale", scale, c_in, s);
  STD_TORCH_CHECK(scale.has_value() || !rest.has_value(), op, ": rest needs scale");
  STD_TORCH_CHECK(a.has_value() || (!scale.has_value() && !eps_n.has_value()), op, ": scale and eps need a");
  if (a.has_value()) check_eps(op, eps_n, *a);
  p.eps = eps;
  p.tile = tile_shape(op, tile);

  Launch run(op, s);
  Tensor out = new_map(s, samples, c_in, height, width, poison);
  Tensor s_out = scale.has_value() && keep_s ? new_map(s, samples, c_in, height, width, poison) : nothing(s);
  p.s = run.in(s); p.W = run.in(W); p.a = run.in(a); p.eps_n = run.in(eps_n); p.skip = run.in(skip); p.scale = run.in(scale); p.rest = run.in(rest);
  p.out = scale.has_value() ? run.out(out) : nullptr;
  p.s_out = scale.has_value() ? run.out(s_out) : run.out(out);
  run.done(launch_transposed_phi(p, run.stream()));
  return {out, s_out};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "transposed_phi(Tensor s, Tensor W, " FISNET_GEOMETRY_SCHEMA ", int height, int width, Tensor? a, float eps, Tensor? eps_n, Tensor? skip, Tensor? scale, "
      "Tensor? rest, bool keep_s, int tile, bool poison=False) -> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) { m.impl("transposed_phi", TORCH_BOX(&fisnet::transposed_phi)); }
