#include "../kernels/zb.h"

#include "common.h"

namespace fisnet {
namespace {
// Strides inside a sample of x or of what is shaped like it; x and the others must agree.
void check_input(const char* op, const char* name, const Tensor& t, const Tensor& x, int64_t maps) {
  check_like(op, name, t, x);
  bool fits = t.dim() == 4 && t.size(0) == x.size(0) * maps;
  for (int64_t d = 1; fits && d < 4; ++d) fits = t.size(d) == x.size(d) && (t.size(d) == 1 || t.stride(d) == x.stride(d));
  STD_TORCH_CHECK(fits, op, ": ", name, " must be [N*K, C_in, H, W] in the memory layout of x");
  STD_TORCH_CHECK(t.is_contiguous() || channels_inside(t), op, ": ", name, " must be dense, contiguous or channels_last");
}

// Checks the operands that forward and adjoint share, and describes the layer.
ZbLayer layer_of(const char* op, const Tensor& R_out, const Tensor& x, const Tensor& z, const Tensor& W, const OptTensor& shift, const Tensor& low,
                 const Tensor& high, const OptTensor& carrier, int64_t stride, int64_t padding) {
  STD_TORCH_CHECK(x.dim() == 4 && z.dim() == 4 && W.dim() == 4, op, ": x, z and W must have four axes");
  STD_TORCH_CHECK(W.size(2) == W.size(3) && W.size(2) >= 1 && W.size(2) <= 7 && W.size(1) >= 1 && W.size(1) <= ZbLayer::kMaxIn, op, ": W must be [C_out, C_in, k, k] with C_in <= 4, k <= 7");
  STD_TORCH_CHECK((stride == 1 || stride == 2) && padding >= 0 && padding < W.size(2), op, ": stride must be 1 or 2, padding less than the kernel");
  STD_TORCH_CHECK(x.size(1) == W.size(1) && z.size(1) == W.size(0) && z.size(0) == x.size(0), op, ": channels or samples of x, z and W do not fit");
  check_like(op, "x", x, z);
  check_like(op, "W", W, z);
  STD_TORCH_CHECK(W.is_contiguous(), op, ": W must be contiguous");
  const Planes planes = planes_of(op, "z", z);
  planes_of(op, "x", x);
  const Maps maps = maps_of(op, "R_out", R_out, z);
  check_same(op, "carrier", carrier, z);
  check_vector(op, "shift", shift, z.size(1), z);
  check_vector(op, "low", low, x.size(1), z);
  check_vector(op, "high", high, x.size(1), z);

  ZbLayer l{};
  l.samples = maps.samples;
  l.maps = maps.maps;
  l.c_in = static_cast<int>(x.size(1)); l.c_out = static_cast<int>(z.size(1));
  l.height = static_cast<int>(x.size(2)); l.width = static_cast<int>(x.size(3));
  l.out_height = static_cast<int>(z.size(2)); l.out_width = static_cast<int>(z.size(3));
  l.kernel = static_cast<int>(W.size(2)); l.stride = static_cast<int>(stride); l.padding = static_cast<int>(padding);
  auto fits = [&](int in, int out) { return in + 2 * l.padding >= l.kernel && out == (in + 2 * l.padding - l.kernel) / l.stride + 1; };
  STD_TORCH_CHECK(fits(l.height, l.out_height) && fits(l.width, l.out_width), op, ": sizes of x and z do not fit");
  const bool last = !x.is_contiguous();
  l.x_channel = last ? 1 : x.size(2) * x.size(3);
  l.x_pixel = last ? x.size(1) : 1;
  l.channels_last = planes.inner == 1;
  return l;
}
// [N*K, C_in, H, W] in the memory layout of x.
Tensor empty_maps(const Tensor& x, int64_t maps) {
  const int64_t n = x.size(0) * maps;
  if (x.is_contiguous()) return torch::stable::new_empty(x, {n, x.size(1), x.size(2), x.size(3)});
  const Tensor last = torch::stable::new_empty(x, {n, x.size(2), x.size(3), x.size(1)});
  return torch::stable::transpose(torch::stable::transpose(last, 1, 3), 2, 3);
}
int size_of(const Tensor& t) { return static_cast<int>(t.element_size()); }

Tensor zb(
    const Tensor& R_out,       // [N*K, C_out, P, Q]
    const Tensor& x,           // [N, C_in, H, W]
    const Tensor& z,           // [N, C_out, P, Q]
    const Tensor& W,           // [C_out, C_in, k, k]
    const OptTensor& shift,    // [C_out]
    const Tensor& low,         // [C_in]
    const Tensor& high,        // [C_in]
    double eps,
    int64_t stride,
    int64_t padding,
    const OptTensor& carrier)  // [N, C_out, P, Q]
{                              // -> R [N*K, C_in, H, W]
  const char* op = "zb";
  ZbParams p{};
  p.dtype = dtype_of(z, op);
  p.layer = layer_of(op, R_out, x, z, W, shift, low, high, carrier, stride, padding);
  p.eps = eps;

  Launch run(op, x);
  Tensor R = empty_maps(x, p.layer.maps);
  Tensor packed = torch::stable::new_empty(z, {zb_packed(p.layer, size_of(z))});
  Tensor box = acc_vector(z, p.layer.boxes());
  p.R_out = run.in(R_out); p.carrier = run.in(carrier); p.z = run.in(z); p.x = run.in(x); p.W = run.in(W); p.shift = run.in(shift);
  p.low = run.in(low); p.high = run.in(high);
  p.packed = run.out(packed); p.box = run.out(box); p.R = run.out(R);
  run.done(launch_zb(p, run.stream()));
  return R;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> zb_backward(
    const Tensor& R_bar,       // [N*K, C_in, H, W]
    const Tensor& R_out,       // [N*K, C_out, P, Q]
    const Tensor& x,           // [N, C_in, H, W]
    const Tensor& z,           // [N, C_out, P, Q]
    const Tensor& W,           // [C_out, C_in, k, k]
    const OptTensor& shift,    // [C_out]
    const Tensor& low,         // [C_in]
    const Tensor& high,        // [C_in]
    double eps,
    int64_t stride,
    int64_t padding,
    bool need_W,
    const OptTensor& carrier)  // [N, C_out, P, Q]
{                              // -> R_out_bar [N*K, C_out, P, Q], W_bar [C_out, C_in, k, k] or [0], shift_bar [C_out] or [0], carrier_bar [N, C_out, P, Q] or [0]
  const char* op = "zb_backward";
  ZbBackwardParams p{};
  p.dtype = dtype_of(z, op);
  p.layer = layer_of(op, R_out, x, z, W, shift, low, high, carrier, stride, padding);
  check_input(op, "R_bar", R_bar, x, p.layer.maps);
  p.eps = eps;
  p.slabs = zb_slabs(p.layer, size_of(z));
  const bool need_shift = need_W && shift.has_value();

  Launch run(op, x);
  Tensor R_out_bar = torch::stable::empty_like(R_out);
  Tensor carrier_bar = carrier.has_value() ? torch::stable::empty_like(*carrier) : nothing(z);
  Tensor W_bar = need_W ? torch::stable::empty_like(W) : nothing(z);
  Tensor shift_bar = need_shift ? acc_vector(z, z.size(1)) : nothing(z);
  Tensor packed = torch::stable::new_empty(z, {zb_packed_backward(p.layer, size_of(z))});
  Tensor box = acc_vector(z, p.layer.boxes());
  Tensor partial = need_W ? acc_vector(z, p.slabs * zb_partial(p.layer)) : nothing(z);
  if (p.layer.samples == 0) {  // sums over nothing; no kernel runs
    if (need_W) torch::stable::zero_(W_bar);
    if (need_shift) torch::stable::zero_(shift_bar);
    return {R_out_bar, W_bar, shift_bar, carrier_bar};
  }
  p.R_bar = run.in(R_bar); p.R_out = run.in(R_out); p.carrier = run.in(carrier); p.z = run.in(z); p.x = run.in(x); p.W = run.in(W);
  p.shift = run.in(shift); p.low = run.in(low); p.high = run.in(high);
  p.packed = run.out(packed); p.box = run.out(box); p.partial = run.out(partial);
  p.R_out_bar = run.out(R_out_bar); p.carrier_bar = run.out(carrier_bar); p.W_bar = run.out(W_bar); p.shift_bar = run.out(shift_bar);
  run.done(launch_zb_backward(p, run.stream()));
  return {R_out_bar, W_bar, shift_bar, carrier_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("zb(Tensor R_out, Tensor x, Tensor z, Tensor W, Tensor? shift, Tensor low, Tensor high, float eps, int stride, int padding, Tensor? carrier) -> Tensor");
  m.def("zb_backward(Tensor R_bar, Tensor R_out, Tensor x, Tensor z, Tensor W, Tensor? shift, Tensor low, Tensor high, float eps, int stride, int padding, bool need_W, Tensor? carrier) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("zb", TORCH_BOX(&fisnet::zb));
  m.impl("zb_backward", TORCH_BOX(&fisnet::zb_backward));
}
