#include "../kernels/dual_phi.h"

#include "maps.h"

namespace fisnet {
namespace {
// What both operators ask of their operands, all [N, C, ...] like `a`; one map a sample.
Maps dual_maps(const char* op, const Tensor& a, const OptTensor& eps_n) {
  check_dense(op, "a", a);
  check_eps(op, eps_n, a);
  return flat(maps_of(op, "a", a, a), eps_n.has_value());
}

std::tuple<Tensor, Tensor> dual_phi(
    const Tensor& g,         // [N, C, ...]
    const Tensor& g_plus,    // [N, C, ...]
    const Tensor& a,         // [N, C, ...]
    const Tensor& z_plus,    // [N, C, ...]
    double eps,
    const OptTensor& eps_n,  // [N]
    double eps_plus) {       // -> s [N, C, ...], s_plus [N, C, ...]
  const char* op = "dual_phi";
  DualPhiParams p{};
  p.dtype = dtype_of(a, op);
  p.shape = dual_maps(op, a, eps_n);
  p.eps = eps;
  p.eps_plus = eps_plus;
  check_same(op, "g", g, a);
  check_same(op, "g_plus", g_plus, a);
  check_same(op, "z_plus", z_plus, a);

  Launch run(op, a);
  Tensor s = torch::stable::empty_like(a), s_plus = torch::stable::empty_like(a);
  p.g = run.in(g); p.g_plus = run.in(g_plus); p.a = run.in(a); p.z_plus = run.in(z_plus); p.eps_n = run.in(eps_n);
  p.s = run.out(s); p.s_plus = run.out(s_plus);
  run.done(launch_dual_phi(p, run.stream()));
  return {s, s_plus};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> dual_phi_backward(
    const Tensor& s_bar,       // [N, C, ...]
    const Tensor& s_plus_bar,  // [N, C, ...]
    const Tensor& a,           // [N, C, ...]
    const Tensor& s,           // [N, C, ...]
    const Tensor& s_plus,      // [N, C, ...]
    const Tensor& z_plus,      // [N, C, ...]
    double eps,
    const OptTensor& eps_n,    // [N]
    double eps_plus) {         // -> g_bar, g_plus_bar, a_bar, z_plus_bar, each [N, C, ...]
  const char* op = "dual_phi_backward";
  DualPhiBackwardParams p{};
  p.dtype = dtype_of(a, op);
  p.shape = dual_maps(op, a, eps_n);
  p.eps = eps;
  p.eps_plus = eps_plus;
  check_same(op, "s_bar", s_bar, a);
  check_same(op, "s_plus_bar", s_plus_bar, a);
  check_same(op, "s", s, a);
  check_same(op, "s_plus", s_plus, a);
  check_same(op, "z_plus", z_plus, a);

  Launch run(op, a);
  Tensor g_bar = torch::stable::empty_like(a), g_plus_bar = torch::stable::empty_like(a);
  Tensor a_bar = torch::stable::empty_like(a), z_plus_bar = torch::stable::empty_like(a);
  p.s_bar = run.in(s_bar); p.s_plus_bar = run.in(s_plus_bar); p.a = run.in(a); p.s = run.in(s); p.s_plus = run.in(s_plus);
  p.z_plus = run.in(z_plus); p.eps_n = run.in(eps_n);
  p.g_bar = run.out(g_bar); p.g_plus_bar = run.out(g_plus_bar); p.a_bar = run.out(a_bar); p.z_plus_bar = run.out(z_plus_bar);
  run.done(launch_dual_phi_backward(p, run.stream()));
  return {g_bar, g_plus_bar, a_bar, z_plus_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("dual_phi(Tensor g, Tensor g_plus, Tensor a, Tensor z_plus, float eps, Tensor? eps_n, float eps_plus) -> (Tensor, Tensor)");
  m.def("dual_phi_backward(Tensor s_bar, Tensor s_plus_bar, Tensor a, Tensor s, Tensor s_plus, Tensor z_plus, float eps, Tensor? eps_n, float eps_plus) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("dual_phi", TORCH_BOX(&fisnet::dual_phi));
  m.impl("dual_phi_backward", TORCH_BOX(&fisnet::dual_phi_backward));
}
