#include "../kernels/plus_affine.h"

#include "maps.h"

namespace fisnet {
namespace {
// As in phi_scale.cpp; here a processor holds two blocks.
constexpr int kMostSlabs = 256;

std::tuple<Tensor, Tensor, Tensor, Tensor> plus_affine(
    const Tensor& R,     // [N*K, C, ...]
    const Tensor& P,     // [N, C, ...]
    const OptTensor& u,  // [N, C, ...]
    const Tensor& k,     // [C]
    const Tensor& c,     // [C]
    double eps) {        // -> plus [N*K, C, ...], minus [N*K, C, ...] or [0], s [N*K, C, ...], den [N, C, ...]
  const char* op = "plus_affine";
  PlusAffineParams p{};
  p.dtype = dtype_of(P, op);
  p.planes = planes_of(op, "P", P);
  p.shape = maps_of(op, "R", R, P);
  p.eps = eps;
  check_same(op, "u", u, P);
  check_vector(op, "k", k, P.size(1), P);
  check_vector(op, "c", c, P.size(1), P);

  Launch run(op, R);
  Tensor plus = torch::stable::empty_like(R), minus = u.has_value() ? torch::stable::empty_like(R) : nothing(R);
  Tensor s = torch::stable::empty_like(R), den = torch::stable::empty_like(P);
  p.R = run.in(R); p.P = run.in(P); p.u = run.in(u); p.k = run.in(k); p.c = run.in(c);
  p.plus = run.out(plus); p.minus = run.out(minus); p.s = run.out(s); p.den = run.out(den);
  run.done(launch_plus_affine(p, run.stream()));
  return {plus, minus, s, den};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> plus_affine_backward(
    const Tensor& plus_bar,      // [N*K, C, ...]
    const OptTensor& minus_bar,  // [N*K, C, ...]
    const Tensor& s,             // [N*K, C, ...]
    const Tensor& den,           // [N, C, ...]
    const Tensor& P,             // [N, C, ...]
    const OptTensor& u,          // [N, C, ...]
    const Tensor& k) {           // [C] -> R_bar [N*K, C, ...], P_bar [N, C, ...], u_bar [N, C, ...] or [0], (k_bar, c_bar) [2, C]
  const char* op = "plus_affine_backward";
  PlusAffineBackwardParams p{};
  p.dtype = dtype_of(P, op);
  p.planes = planes_of(op, "P", P);
  p.shape = flat(maps_of(op, "plus_bar", plus_bar, P), false);
  check_same(op, "minus_bar", minus_bar, plus_bar);
  check_same(op, "s", s, plus_bar);
  check_same(op, "den", den, P);
  check_same(op, "u", u, P);
  check_vector(op, "k", k, P.size(1), P);

  Launch run(op, plus_bar);
  Tensor R_bar = torch::stable::empty_like(plus_bar), P_bar = torch::stable::empty_like(P);
  Tensor u_bar = u.has_value() ? torch::stable::empty_like(P) : nothing(P);
  Tensor sums = torch::stable::new_empty(P, {2, P.size(1)}, acc_type(P));
  if (P.numel() == 0) {
    torch::stable::zero_(sums);  // sums over nothing; no kernel runs
    return {R_bar, P_bar, u_bar, sums};
  }
  p.slabs = std::min(kMostSlabs, ChannelGrid::of(p.planes, static_cast<int>(16 / P.element_size())).slabs);
  Tensor partial = acc_vector(P, int64_t{2} * p.slabs * P.size(1));
  p.plus_bar = run.in(plus_bar); p.minus_bar = run.in(minus_bar); p.s = run.in(s); p.den = run.in(den); p.P = run.in(P);
  p.u = run.in(u); p.k = run.in(k);
  p.R_bar = run.out(R_bar); p.P_bar = run.out(P_bar); p.u_bar = run.out(u_bar); p.partial = run.out(partial); p.sums = run.out(sums);
  run.done(launch_plus_affine_backward(p, run.stream()));
  return {R_bar, P_bar, u_bar, sums};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("plus_affine(Tensor R, Tensor P, Tensor? u, Tensor k, Tensor c, float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("plus_affine_backward(Tensor plus_bar, Tensor? minus_bar, Tensor s, Tensor den, Tensor P, Tensor? u, Tensor k) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("plus_affine", TORCH_BOX(&fisnet::plus_affine));
  m.impl("plus_affine_backward", TORCH_BOX(&fisnet::plus_affine_backward));
}
