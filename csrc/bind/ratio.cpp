#include "../kernels/ratio.h"

#include "maps.h"

namespace fisnet {
namespace {
std::tuple<Tensor, Tensor> ratio(
    const Tensor& R,         // [N*K, ...]
    const Tensor& z,         // [N, ...]
    double eps,
    const OptTensor& eps_n,  // [N]
    bool nonneg) {           // -> s [N*K, ...], den [N, ...]
  const char* op = "ratio";
  RatioParams p{};
  p.dtype = dtype_of(z, op);
  check_dense(op, "z", z);
  check_eps(op, eps_n, z);
  p.shape = flat(maps_of(op, "R", R, z), eps_n.has_value());
  p.eps = eps;
  p.nonneg = nonneg;

  Launch run(op, R);
  Tensor s = torch::stable::empty_like(R), den = torch::stable::empty_like(z);
  p.R = run.in(R); p.z = run.in(z); p.eps_n = run.in(eps_n);
  p.s = run.out(s); p.den = run.out(den);
  run.done(launch_ratio(p, run.stream()));
  return {s, den};
}

std::tuple<Tensor, Tensor> ratio_backward(
    const Tensor& s_bar,  // [N*K, ...]
    const Tensor& s,      // [N*K, ...]
    const Tensor& den,    // [N, ...]
    bool need_z) {        // -> R_bar [N*K, ...], z_bar [N, ...] or [0]
  const char* op = "ratio_backward";
  RatioBackwardParams p{};
  p.dtype = dtype_of(den, op);
  check_dense(op, "den", den);
  p.shape = flat(maps_of(op, "s_bar", s_bar, den), false);
  check_same(op, "s", s, s_bar);

  Launch run(op, s_bar);
  Tensor R_bar = torch::stable::empty_like(s_bar), z_bar = need_z ? torch::stable::empty_like(den) : nothing(den);
  p.s_bar = run.in(s_bar); p.s = need_z ? run.in(s) : nullptr; p.den = run.in(den);
  p.R_bar = run.out(R_bar); p.z_bar = run.out(z_bar);
  run.done(launch_ratio_backward(p, run.stream()));
  return {R_bar, z_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("ratio(Tensor R, Tensor z, float eps, Tensor? eps_n, bool nonneg) -> (Tensor, Tensor)");
  m.def("ratio_backward(Tensor s_bar, Tensor s, Tensor den, bool need_z) -> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("ratio", TORCH_BOX(&fisnet::ratio));
  m.impl("ratio_backward", TORCH_BOX(&fisnet::ratio_backward));
}
