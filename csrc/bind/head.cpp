#include "../kernels/head.h"

#include "maps.h"
#include "new_tensor.h"

namespace fisnet {
namespace {
// logits [N, C] and index [N, K].
void check_eta(const char* op, const Tensor& logits, const Tensor& index) {
  check_device(op, "index", index, logits);
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous(), op, ": logits must be a contiguous [N, C]");
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Long, op, ": index must be int64");
  STD_TORCH_CHECK(index.dim() == 2 && index.is_contiguous() && index.size(0) == logits.size(0), op, ": index must be a contiguous [N, K]");
  STD_TORCH_CHECK(logits.size(1) <= std::numeric_limits<int32_t>::max() && index.size(1) <= std::numeric_limits<int32_t>::max(), op, ": too many classes or maps");
}

Tensor eta_start(
    const Tensor& logits,  // [N, C]
    const Tensor& index,   // [N, K] int64
    double eta_eps) {      // -> start [N, K, C] accumulation type
  const char* op = "eta_start";
  EtaStartParams p{};
  p.dtype = dtype_of(logits, op);
  check_eta(op, logits, index);
  p.samples = logits.size(0);
  p.maps = static_cast<int>(index.size(1));
  p.classes = static_cast<int>(logits.size(1));
  p.eta_eps = eta_eps;

  Launch run(op, logits);
  Tensor start = torch::stable::new_empty(logits, Ints{p.samples, p.maps, p.classes}, acc_type(logits));
  p.logits = run.in(logits); p.index = run.in(index); p.start = run.out(start);
  run.done(launch_eta_start(p, run.stream()));
  return start;
}

Tensor eta_start_backward(
    const Tensor& start_bar,  // [N, K, C] accumulation type
    const Tensor& logits,     // [N, C]
    const Tensor& index,      // [N, K] int64
    double eta_eps) {         // -> logits_bar [N, C]
  const char* op = "eta_start_backward";
  EtaStartBackwardParams p{};
  p.dtype = dtype_of(logits, op);
  check_eta(op, logits, index);
  p.samples = logits.size(0);
  p.maps = static_cast<int>(index.size(1));
  p.classes = static_cast<int>(logits.size(1));
  p.eta_eps = eta_eps;
  check_vector(op, "start_bar", start_bar, p.samples * p.maps * p.classes, logits);

  Launch run(op, logits);
  Tensor P_bar = acc_vector(logits, p.samples * p.classes);
  Tensor logits_bar = torch::stable::empty_like(logits);
  p.start_bar = run.in(start_bar); p.logits = run.in(logits); p.index = run.in(index);
  p.P_bar = run.out(P_bar); p.logits_bar = run.out(logits_bar);
  run.done(launch_eta_start_backward(p, run.stream()));
  return logits_bar;
}

// s+ of P, or with s_bar its adjoint.
Tensor plus(const char* op, const Tensor& P, const OptTensor& bias, const OptTensor& s_bar, double eps) {
  PlusStartParams p{};
  p.dtype = dtype_of(P, op);
  check_device(op, "P", P, P);
  STD_TORCH_CHECK(P.dim() >= 1 && P.is_contiguous(), op, ": P must be a contiguous [..., C]");
  const int64_t classes = P.size(P.dim() - 1);
  STD_TORCH_CHECK(classes <= std::numeric_limits<int32_t>::max(), op, ": too many classes");
  if (bias.has_value()) check_like(op, "bias", *bias, P);
  STD_TORCH_CHECK(!bias.has_value() || (bias->numel() == classes && bias->is_contiguous()), op, ": bias must have one value a class");
  check_same(op, "s_bar", s_bar, P);
  p.classes = static_cast<int>(classes);
  p.rows = classes ? P.numel() / classes : 0;
  p.eps = eps;

  Launch run(op, P);
  Tensor out = torch::stable::empty_like(P);
  p.P = run.in(P); p.bias = run.in(bias); p.s_bar = run.in(s_bar); p.out = run.out(out);
  run.done(launch_plus_start(p, run.stream()));
  return out;
}
Tensor plus_start(
    const Tensor& P,        // [..., C]
    const OptTensor& bias,  // [C]
    double eps) {           // -> s+ [..., C]
  return plus("plus_start", P, bias, std::nullopt, eps);
}
Tensor plus_start_backward(
    const Tensor& s_bar,    // [..., C]
    const Tensor& P,        // [..., C]
    const OptTensor& bias,  // [C]
    double eps) {           // -> P_bar [..., C]
  return plus("plus_start_backward", P, bias, s_bar, eps);
}

// Fills what both directions share of a [N, C, ...] and its pooled relevance g [N*K, C].
template <typename Params>
void set_pooled(const char* op, Params& p, const Tensor& a, const Tensor& g, const OptTensor& g_plus, const OptTensor& z_plus, double eps, const OptTensor& eps_n, double eps_plus) {
  p.dtype = dtype_of(a, op);
  const Planes planes = planes_of(op, "a", a);
  STD_TORCH_CHECK(a.is_contiguous() || a.dim() == 4 || a.dim() == 5, op, ": a must be contiguous, or have 4 or 5 axes in channels_last");
  int64_t pixels = 1;
  for (int64_t d = 2; d < a.dim(); ++d) pixels *= a.size(d);
  check_like(op, "g", g, a);
  STD_TORCH_CHECK(g.dim() == 2 && g.is_contiguous() && g.size(1) == a.size(1) && (a.size(0) ? g.size(0) % a.size(0) == 0 : g.size(0) == 0), op, ": g must be a contiguous [N*K, C] over a's [N, C, ...]");
  p.samples = a.size(0);
  p.maps = a.size(0) ? static_cast<int>(g.size(0) / a.size(0)) : 1;
  p.channels = planes.channels;
  p.pixels = static_cast<int>(pixels);
  p.channels_last = planes.inner == 1;
  p.eps = eps;
  p.eps_plus = eps_plus;
  check_eps(op, eps_n, a);
  STD_TORCH_CHECK(g_plus.has_value() == z_plus.has_value(), op, ": g_plus and z_plus come together");
  if (!z_plus.has_value()) return;
  STD_TORCH_CHECK(p.maps == 1, op, ": z_plus has one map a sample");
  check_same(op, "g_plus", g_plus, g);
  check_same(op, "z_plus", z_plus, a);
}

std::tuple<Tensor, Tensor> pooled_phi(
    const Tensor& g,          // [N*K, C]
    const Tensor& a,          // [N, C, ...]
    double eps,
    const OptTensor& eps_n,   // [N]
    const OptTensor& g_plus,  // [N, C]
    const OptTensor& z_plus,  // [N, C, ...]
    double eps_plus) {        // -> s [N*K, C, ...], s_plus [N, C, ...] or [0]
  const char* op = "pooled_phi";
  PooledPhiParams p{};
  set_pooled(op, p, a, g, g_plus, z_plus, eps, eps_n, eps_plus);

  Launch run(op, a);
  Ints sizes(a.sizes().begin(), a.sizes().end());
  sizes[0] = g.size(0);
  Tensor s = empty_of(a, sizes, a.scalar_type(), !a.is_contiguous());
  Tensor s_plus = z_plus.has_value() ? torch::stable::empty_like(a) : nothing(a);
  p.g = run.in(g); p.a = run.in(a); p.eps_n = run.in(eps_n); p.g_plus = run.in(g_plus); p.z_plus = run.in(z_plus);
  p.s = run.out(s); p.s_plus = run.out(s_plus);
  run.done(launch_pooled_phi(p, run.stream()));
  return {s, s_plus};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> pooled_phi_backward(
    const Tensor& s_bar,          // [N*K, C, ...]
    const OptTensor& s_plus_bar,  // [N, C, ...]
    const Tensor& g,              // [N*K, C]
    const Tensor& a,              // [N, C, ...]
    double eps,
    const OptTensor& eps_n,       // [N]
    const OptTensor& g_plus,      // [N, C]
    const OptTensor& z_plus,      // [N, C, ...]
    double eps_plus,
    bool need_a) {                // -> g_bar [N*K, C], a_bar [N, C, ...] or [0], g_plus_bar [N, C] or [0], z_plus_bar [N, C, ...] or [0]
  const char* op = "pooled_phi_backward";
  PooledPhiBackwardParams p{};
  set_pooled(op, p, a, g, g_plus, z_plus, eps, eps_n, eps_plus);
  const Maps maps = maps_of(op, "s_bar", s_bar, a);
  STD_TORCH_CHECK(maps.samples * maps.maps == p.samples * p.maps, op, ": s_bar must have as many maps as g");
  STD_TORCH_CHECK(s_plus_bar.has_value() == z_plus.has_value(), op, ": s_plus_bar and z_plus come together");
  check_same(op, "s_plus_bar", s_plus_bar, a);

  Launch run(op, a);
  Tensor g_bar = torch::stable::empty_like(g);
  Tensor a_bar = need_a ? torch::stable::empty_like(a) : nothing(a);
  Tensor g_plus_bar = z_plus.has_value() ? torch::stable::empty_like(*g_plus) : nothing(g);
  Tensor z_plus_bar = z_plus.has_value() ? torch::stable::empty_like(a) : nothing(a);
  p.s_bar = run.in(s_bar); p.s_plus_bar = run.in(s_plus_bar); p.g = run.in(g); p.a = run.in(a); p.eps_n = run.in(eps_n);
  p.g_plus = run.in(g_plus); p.z_plus = run.in(z_plus);
  p.g_bar = run.out(g_bar); p.a_bar = run.out(a_bar); p.g_plus_bar = run.out(g_plus_bar); p.z_plus_bar = run.out(z_plus_bar);
  run.done(launch_pooled_phi_backward(p, run.stream()));
  return {g_bar, a_bar, g_plus_bar, z_plus_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("eta_start(Tensor logits, Tensor index, float eta_eps) -> Tensor");
  m.def("eta_start_backward(Tensor start_bar, Tensor logits, Tensor index, float eta_eps) -> Tensor");
  m.def("plus_start(Tensor P, Tensor? bias, float eps) -> Tensor");
  m.def("plus_start_backward(Tensor s_bar, Tensor P, Tensor? bias, float eps) -> Tensor");
  m.def("pooled_phi(Tensor g, Tensor a, float eps, Tensor? eps_n, Tensor? g_plus, Tensor? z_plus, float eps_plus) -> (Tensor, Tensor)");
  m.def("pooled_phi_backward(Tensor s_bar, Tensor? s_plus_bar, Tensor g, Tensor a, float eps, Tensor? eps_n, Tensor? g_plus, Tensor? z_plus, float eps_plus, bool need_a) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("eta_start", TORCH_BOX(&fisnet::eta_start));
  m.impl("eta_start_backward", TORCH_BOX(&fisnet::eta_start_backward));
  m.impl("plus_start", TORCH_BOX(&fisnet::plus_start));
  m.impl("plus_start_backward", TORCH_BOX(&fisnet::plus_start_backward));
  m.impl("pooled_phi", TORCH_BOX(&fisnet::pooled_phi));
  m.impl("pooled_phi_backward", TORCH_BOX(&fisnet::pooled_phi_backward));
}
