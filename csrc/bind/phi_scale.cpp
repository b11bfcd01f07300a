#include "../kernels/phi_scale.h"

#include "maps.h"

namespace fisnet {
namespace {
// The grid of the adjoint has this many blocks a channel tile at most: all of them at once on the largest GPUs, which hold
// three on each of 132 processors, so that no second round runs half empty.
constexpr int kMostSlabs = 384;

std::tuple<Tensor, Tensor> phi_scale(
    const Tensor& g,         // [N*K, C, ...]
    const Tensor& a,         // [N, C, ...]
    double eps,
    const OptTensor& eps_n,  // [N]
    const OptTensor& skip,   // [N*K, C, ...]
    const OptTensor& scale,  // [C]
    const OptTensor& rest,   // [N*K, C, ...]
    bool keep_s) {           // -> out [N*K, C, ...], s [N*K, C, ...] or [0]
  const char* op = "phi_scale";
  PhiScaleParams p{};
  p.dtype = dtype_of(a, op);
  p.planes = planes_of(op, "a", a);
  p.shape = maps_of(op, "g", g, a);
  if (!scale.has_value()) p.shape = flat(p.shape, eps_n.has_value());
  p.eps = eps;
  check_same(op, "skip", skip, g);
  check_same(op, "rest", rest, g);
  check_vector(op, "scale", scale, a.size(1), a);
  check_eps(op, eps_n, a);
  STD_TORCH_CHECK(scale.has_value() || !rest.has_value(), op, ": rest needs scale");

  Launch run(op, g);
  Tensor out = torch::stable::empty_like(g);
  Tensor s = scale.has_value() && keep_s ? torch::stable::empty_like(g) : nothing(g);
  p.g = run.in(g); p.a = run.in(a); p.eps_n = run.in(eps_n); p.skip = run.in(skip); p.scale = run.in(scale); p.rest = run.in(rest);
  p.out = scale.has_value() ? run.out(out) : nullptr;
  p.s = scale.has_value() ? run.out(s) : run.out(out);
  run.done(launch_phi_scale(p, run.stream()));
  return {out, s};
}

std::tuple<Tensor, Tensor, Tensor> phi_scale_backward(
    const Tensor& s_bar,     // [N*K, C, ...]
    const Tensor& s,         // [N*K, C, ...]
    const Tensor& a,         // [N, C, ...]
    double eps,
    const OptTensor& eps_n,  // [N]
    const OptTensor& scale,  // [C]
    bool need_a,
    bool need_scale,
    const OptTensor& join) {  // [N*K, C, ...] -> g_bar [N*K, C, ...], a_bar [N, C, ...] or [0], scale_bar [C] or [0]
  const char* op = "phi_scale_backward";
  PhiScaleBackwardParams p{};
  p.dtype = dtype_of(a, op);
  p.planes = planes_of(op, "a", a);
  p.shape = maps_of(op, "s_bar", s_bar, a);
  p.shape = flat(p.shape, eps_n.has_value());
  p.eps = eps;
  check_same(op, "s", s, s_bar);
  check_same(op, "join", join, s_bar);
  check_vector(op, "scale", scale, a.size(1), a);
  check_eps(op, eps_n, a);
  need_scale = need_scale && scale.has_value();

  Launch run(op, s_bar);
  Tensor g_bar = torch::stable::empty_like(s_bar);
  Tensor a_bar = need_a ? torch::stable::empty_like(a) : nothing(a);
  Tensor scale_bar = need_scale ? acc_vector(a, a.size(1)) : nothing(a);
  p.slabs = std::min(kMostSlabs, ChannelGrid::of(p.planes, static_cast<int>(16 / a.element_size())).slabs);
  Tensor partial = need_scale ? acc_vector(a, p.slabs * a.size(1)) : nothing(a);
  if (need_scale && a.numel() == 0) torch::stable::zero_(scale_bar);  // the sum over nothing; no kernel runs
  p.s_bar = run.in(s_bar); p.join = run.in(join); p.s = run.in(s); p.a = run.in(a); p.eps_n = run.in(eps_n); p.scale = run.in(scale);
  p.g_bar = run.out(g_bar); p.a_bar = run.out(a_bar); p.partial = run.out(partial);
  if (a.numel() != 0) p.scale_bar = run.out(scale_bar);
  run.done(launch_phi_scale_backward(p, run.stream()));
  return {g_bar, a_bar, scale_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("phi_scale(Tensor g, Tensor a, float eps, Tensor? eps_n, Tensor? skip, Tensor? scale, Tensor? rest, bool keep_s) -> (Tensor, Tensor)");
  m.def("phi_scale_backward(Tensor s_bar, Tensor s, Tensor a, float eps, Tensor? eps_n, Tensor? scale, bool need_a, bool need_scale, Tensor? join=None) -> (Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("phi_scale", TORCH_BOX(&fisnet::phi_scale));
  m.impl("phi_scale_backward", TORCH_BOX(&fisnet::phi_scale_backward));
}
