#include "../kernels/max_pool.h"

#include "maps.h"
#include "new_tensor.h"

namespace fisnet {
namespace {
// `window` holds kernel, stride, padding and dilation, of rows and of columns.
Windows windows_of(const char* op, int64_t in_h, int64_t in_w, int64_t out_h, int64_t out_w, const Ints& window) {
  STD_TORCH_CHECK(window.size() == 8, op, ": window must have 8 values: kernel, stride, padding, dilation");
  for (const int64_t v : window) STD_TORCH_CHECK(v >= 0 && v <= (1 << 20), op, ": a setting of the window is out of range: ", v);
  for (const int i : {0, 1, 2, 3, 6, 7}) STD_TORCH_CHECK(window[i] > 0, op, ": kernel, stride and dilation must be positive");
  STD_TORCH_CHECK(window[0] * window[1] <= 256, op, ": a winner is one byte, and the window has ", window[0] * window[1], " pixels");
  Windows w{};
  w.in_h = static_cast<int>(in_h); w.in_w = static_cast<int>(in_w); w.out_h = static_cast<int>(out_h); w.out_w = static_cast<int>(out_w);
  w.kernel_h = static_cast<int>(window[0]); w.kernel_w = static_cast<int>(window[1]);
  w.stride_h = static_cast<int>(window[2]); w.stride_w = static_cast<int>(window[3]);
  w.pad_h = static_cast<int>(window[4]); w.pad_w = static_cast<int>(window[5]);
  w.dilation_h = static_cast<int>(window[6]); w.dilation_w = static_cast<int>(window[7]);
  return w;
}

// Whether the operands lie in channels_last: one that is not contiguous decides (tensors of one pixel or channel are both).
bool layout_of(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors)
    if (t && !t->is_contiguous()) return channels_inside(*t);
  return false;
}
void check_4d(const char* op, const char* name, const Tensor& t, bool channels_last) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must be [N, C, H, W]");
  STD_TORCH_CHECK(channels_last ? channels_inside(t) : t.is_contiguous(), op, ": ", name, " must be dense, in the memory layout of the other operands");
  const int64_t sample = t.size(1) * t.size(2) * t.size(3);
  STD_TORCH_CHECK(sample <= std::numeric_limits<int32_t>::max(), op, ": one sample of ", name, " has more than 2^31 - 1 elements");
}
void check_winners(const char* op, const Tensor& winners, const Tensor& like, bool channels_last) {
  check_device(op, "winners", winners, like);
  STD_TORCH_CHECK(winners.scalar_type() == ScalarType::Byte, op, ": winners must be uint8");
  check_4d(op, "winners", winners, channels_last);
}
// r [N*K, C, h, w] over the winners' [N, C, out_h, out_w]: returns K.
int maps_over(const char* op, const char* name, const Tensor& r, const Tensor& winners, int64_t h, int64_t w) {
  const int64_t n = winners.size(0);
  const bool fits = (n ? r.size(0) % n == 0 : r.size(0) == 0) && r.size(1) == winners.size(1) && r.size(2) == h && r.size(3) == w;
  STD_TORCH_CHECK(fits, op, ": ", name, " must be [N*K, C, ", h, ", ", w, "] over the winners' [N, C, ...]");
  return n ? static_cast<int>(r.size(0) / n) : 1;
}
// What phi needs: a [N, C, H, W] beside relevance r [N*K, C, H, W], and its epsilon.
void check_phi(const char* op, const Tensor& a, const OptTensor& eps_n, const Tensor& r, const Tensor& winners, bool channels_last) {
  check_like(op, "a", a, r);
  check_4d(op, "a", a, channels_last);
  STD_TORCH_CHECK(a.size(0) == winners.size(0) && a.size(1) == winners.size(1), op, ": a must be [N, C, H, W] over the winners' [N, C, ...]");
  check_eps(op, eps_n, a);
}

std::tuple<Tensor, Tensor> max_pool(
    const Tensor& x,     // [N, C, H, W]
    Ints out_size,       // [2]
    Ints window) {       // [8] -> y, winners [N, C, *out_size]
  const char* op = "max_pool";
  MaxPoolParams p{};
  p.dtype = dtype_of(x, op);
  check_device(op, "x", x, x);
  p.channels_last = layout_of({&x});
  check_4d(op, "x", x, p.channels_last);
  STD_TORCH_CHECK(out_size.size() == 2 && out_size[0] > 0 && out_size[1] > 0, op, ": out_size must be two positive numbers");
  STD_TORCH_CHECK(x.size(1) * out_size[0] * out_size[1] <= std::numeric_limits<int32_t>::max(), op, ": one sample of the result has more than 2^31 - 1 elements");
  p.samples = x.size(0);
  p.channels = static_cast<int>(x.size(1));
  p.windows = windows_of(op, x.size(2), x.size(3), out_size[0], out_size[1], window);

  Launch run(op, x);
  const Ints sizes{x.size(0), x.size(1), out_size[0], out_size[1]};
  Tensor y = empty_of(x, sizes, x.scalar_type(), p.channels_last);
  Tensor winners = empty_of(x, sizes, ScalarType::Byte, p.channels_last);
  p.x = run.in(x); p.y = run.out(y); p.winners = run.out(winners);
  run.done(launch_max_pool(p, run.stream()));
  return {y, winners};
}

// Both transposes: with a, fused with phi.
Tensor scatter(const char* op, const Tensor& g, const Tensor& winners, const Tensor* a, double eps, const OptTensor& eps_n, const OptTensor& skip, const Ints& in_size, const Ints& window) {
  MaxPoolScatterParams p{};
  p.dtype = dtype_of(g, op);
  check_device(op, "g", g, g);
  p.channels_last = layout_of({&g, &winners, a, skip.has_value() ? &*skip : nullptr});
  check_4d(op, "g", g, p.channels_last);
  check_winners(op, winners, g, p.channels_last);
  STD_TORCH_CHECK(in_size.size() == 2 && in_size[0] > 0 && in_size[1] > 0, op, ": in_size must be two positive numbers");
  STD_TORCH_CHECK(g.size(1) * in_size[0] * in_size[1] <= std::numeric_limits<int32_t>::max(), op, ": one sample of the result has more than 2^31 - 1 elements");
  p.samples = winners.size(0);
  p.channels = static_cast<int>(winners.size(1));
  p.maps = maps_over(op, "g", g, winners, winners.size(2), winners.size(3));
  p.windows = windows_of(op, in_size[0], in_size[1], winners.size(2), winners.size(3), window);
  p.eps = eps;
  if (a) {
    check_phi(op, *a, eps_n, g, winners, p.channels_last);
    STD_TORCH_CHECK(a->size(2) == in_size[0] && a->size(3) == in_size[1], op, ": a must have the pool's input size");
  }
  if (skip.has_value()) {
    check_like(op, "skip", *skip, g);
    check_4d(op, "skip", *skip, p.channels_last);
    STD_TORCH_CHECK(maps_over(op, "skip", *skip, winners, in_size[0], in_size[1]) == p.maps, op, ": skip must have as many maps as g");
  }

  Launch run(op, g);
  Tensor out = empty_of(g, {g.size(0), g.size(1), in_size[0], in_size[1]}, g.scalar_type(), p.channels_last);
  p.g = run.in(g); p.winners = run.in(winners); p.eps_n = run.in(eps_n); p.skip = run.in(skip);
  if (a) p.a = run.in(*a);
  p.out = run.out(out);
  run.done(launch_max_pool_scatter(p, run.stream()));
  return out;
}

Tensor max_pool_scatter(
    const Tensor& g,        // [N*K, C, out_h, out_w]
    const Tensor& winners,  // [N, C, out_h, out_w] uint8
    Ints in_size,           // [2]
    Ints window) {          // [8] -> [N*K, C, *in_size]
  return scatter("max_pool_scatter", g, winners, nullptr, 0, std::nullopt, std::nullopt, in_size, window);
}

Tensor max_pool_scatter_phi(
    const Tensor& g,         // [N*K, C, out_h, out_w]
    const Tensor& winners,   // [N, C, out_h, out_w] uint8
    const Tensor& a,         // [N, C, H, W]
    double eps,
    const OptTensor& eps_n,  // [N]
    const OptTensor& skip,   // [N*K, C, H, W]
    Ints window) {           // [8] -> s [N*K, C, H, W]
  STD_TORCH_CHECK(a.dim() == 4, "max_pool_scatter_phi: a must be [N, C, H, W]");
  return scatter("max_pool_scatter_phi", g, winners, &a, eps, eps_n, skip, {a.size(2), a.size(3)}, window);
}

Tensor max_pool_gather(
    const Tensor& x,        // [N*K, C, H, W]
    const Tensor& winners,  // [N, C, out_h, out_w] uint8
    Ints window) {          // [8] -> [N*K, C, out_h, out_w]
  const char* op = "max_pool_gather";
  MaxPoolGatherParams p{};
  p.dtype = dtype_of(x, op);
  check_device(op, "x", x, x);
  p.channels_last = layout_of({&x, &winners});
  check_4d(op, "x", x, p.channels_last);
  check_winners(op, winners, x, p.channels_last);
  p.samples = winners.size(0);
  p.channels = static_cast<int>(winners.size(1));
  p.maps = maps_over(op, "x", x, winners, x.size(2), x.size(3));
  p.windows = windows_of(op, x.size(2), x.size(3), winners.size(2), winners.size(3), window);

  Launch run(op, x);
  Tensor out = empty_of(x, {x.size(0), x.size(1), winners.size(2), winners.size(3)}, x.scalar_type(), p.channels_last);
  p.s_bar = run.in(x); p.winners = run.in(winners); p.g_bar = run.out(out);
  run.done(launch_max_pool_gather(p, run.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> max_pool_scatter_phi_backward(
    const Tensor& s_bar,     // [N*K, C, H, W]
    const OptTensor& s,      // [N*K, C, H, W]; with need_a
    const Tensor& winners,   // [N, C, out_h, out_w] uint8
    const Tensor& a,         // [N, C, H, W]
    double eps,
    const OptTensor& eps_n,  // [N]
    Ints window,             // [8]
    bool need_a,
    bool need_skip) {        // -> g_bar [N*K, C, out_h, out_w], a_bar [N, C, H, W] or [0], skip_bar [N*K, C, H, W] or [0]
  const char* op = "max_pool_scatter_phi_backward";
  MaxPoolGatherParams p{};
  p.dtype = dtype_of(s_bar, op);
  check_device(op, "s_bar", s_bar, s_bar);
  p.channels_last = layout_of({&s_bar, &winners, &a});
  check_4d(op, "s_bar", s_bar, p.channels_last);
  check_winners(op, winners, s_bar, p.channels_last);
  check_phi(op, a, eps_n, s_bar, winners, p.channels_last);
  p.samples = winners.size(0);
  p.channels = static_cast<int>(winners.size(1));
  p.maps = maps_over(op, "s_bar", s_bar, winners, a.size(2), a.size(3));
  p.windows = windows_of(op, a.size(2), a.size(3), winners.size(2), winners.size(3), window);
  p.eps = eps;
  STD_TORCH_CHECK(s.has_value() || !need_a, op, ": a_bar needs s");
  check_same(op, "s", s, s_bar);

  Launch run(op, s_bar);
  Tensor g_bar = empty_of(s_bar, {s_bar.size(0), s_bar.size(1), winners.size(2), winners.size(3)}, s_bar.scalar_type(), p.channels_last);
  Tensor a_bar = need_a ? torch::stable::empty_like(a) : nothing(a);
  Tensor skip_bar = need_skip ? torch::stable::empty_like(s_bar) : nothing(s_bar);
  p.s_bar = run.in(s_bar); p.winners = run.in(winners); p.a = run.in(a); p.eps_n = run.in(eps_n);
  p.s = need_a ? run.in(s) : nullptr;
  p.g_bar = run.out(g_bar); p.a_bar = run.out(a_bar); p.skip_bar = run.out(skip_bar);
  run.done(launch_max_pool_gather(p, run.stream()));
  return {g_bar, a_bar, skip_bar};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("max_pool(Tensor x, int[] out_size, int[] window) -> (Tensor, Tensor)");
  m.def("max_pool_scatter(Tensor g, Tensor winners, int[] in_size, int[] window) -> Tensor");
  m.def("max_pool_gather(Tensor x, Tensor winners, int[] window) -> Tensor");
  m.def("max_pool_scatter_phi(Tensor g, Tensor winners, Tensor a, float eps, Tensor? eps_n, Tensor? skip, int[] window) -> Tensor");
  m.def("max_pool_scatter_phi_backward(Tensor s_bar, Tensor? s, Tensor winners, Tensor a, float eps, Tensor? eps_n, int[] window, bool need_a, bool need_skip) -> (Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("max_pool", TORCH_BOX(&fisnet::max_pool));
  m.impl("max_pool_scatter", TORCH_BOX(&fisnet::max_pool_scatter));
  m.impl("max_pool_gather", TORCH_BOX(&fisnet::max_pool_gather));
  m.impl("max_pool_scatter_phi", TORCH_BOX(&fisnet::max_pool_scatter_phi));
  m.impl("max_pool_scatter_phi_backward", TORCH_BOX(&fisnet::max_pool_scatter_phi_backward));
}
