#include "../kernels/bn_act.h"

#include <vector>

#include "common.h"

namespace fisnet {
namespace {
int slabs_of(const Planes& planes, const Tensor& t) { return ChannelGrid::of(planes, static_cast<int>(16 / t.element_size())).slabs; }
int64_t mask_bytes(const Tensor& t) { return (t.numel() + 7) / 8; }

std::tuple<Tensor, Tensor> bn_statistics(
    const Tensor& x,                // [N, part of C, ...]
    const OptTensor& running_mean,  // [C], updated in place
    const OptTensor& running_var,   // [C], updated in place
    double momentum,
    double eps,
    const OptTensor& known_mean,    // [rest of C]
    const OptTensor& known_rstd,    // [rest of C]
    int64_t first) {                // x's channels start here -> mean [C], rstd [C]
  const char* op = "bn_statistics";
  BnStatisticsParams p{};
  p.dtype = dtype_of(x, op);
  p.planes = planes_of(op, "x", x);
  p.momentum = momentum;
  p.eps = eps;
  STD_TORCH_CHECK(known_mean.has_value() == known_rstd.has_value(), op, ": known_mean and known_rstd come together");
  const int64_t known = known_mean.has_value() ? known_mean->numel() : 0, whole = x.size(1) + known;
  STD_TORCH_CHECK(whole <= std::numeric_limits<int32_t>::max(), op, ": more than 2^31 - 1 channels");
  STD_TORCH_CHECK(first >= 0 && first <= known, op, ": first must lie within the ", known, " known channels, got ", first);
  check_vector(op, "known_mean", known_mean, known, x);
  check_vector(op, "known_rstd", known_rstd, known, x);
  p.whole = static_cast<int>(whole);
  p.first = static_cast<int>(first);
  STD_TORCH_CHECK(running_mean.has_value() == running_var.has_value(), op, ": running_mean and running_var come together");
  if (running_mean.has_value()) {
    p.running_dtype = dtype_of(*running_mean, op);
    check_device(op, "running_mean", *running_mean, x);
    check_like(op, "running_var", *running_var, *running_mean);
    for (const Tensor* t : {&*running_mean, &*running_var})
      STD_TORCH_CHECK(t->numel() == whole && t->is_contiguous(), op, ": running statistics must be contiguous vectors of ", whole, " values");
  }
  Tensor mean = acc_vector(x, whole), rstd = acc_vector(x, whole);
  if (x.numel() == 0) {  // no statistics of nothing: those that change nothing
    torch::stable::zero_(mean);
    torch::stable::fill_(rstd, 1.0);
    return {mean, rstd};
  }
  STD_TORCH_CHECK(x.numel() > x.size(1), op, ": one value a channel has no variance");

  Launch run(op, x);
  p.slabs = slabs_of(p.planes, x);
  Tensor partial = acc_vector(x, int64_t{4} * p.slabs * x.size(1));
  p.x = run.in(x); p.known_mean = run.in(known_mean); p.known_rstd = run.in(known_rstd); p.partial = run.out(partial); p.mean = run.out(mean); p.rstd = run.out(rstd);
  p.running_mean = run.update(running_mean); p.running_var = run.update(running_var);
  run.done(launch_bn_statistics(p, run.stream()));
  return {mean, rstd};
}

std::tuple<Tensor, Tensor> bn_apply(
    const Tensor& x,          // [N, C, ...]
    const Tensor& mean,       // [C]
    const Tensor& rstd,       // [C]
    const OptTensor& weight,  // [C]
    const OptTensor& bias,    // [C]
    const OptTensor& skip,    // [N, C, ...]
    bool relu,
    bool keep_mask) {         // -> y [N, C, ...], mask [ceil(numel / 8)] or [0]
  const char* op = "bn_apply";
  BnApplyParams p{};
  p.dtype = dtype_of(x, op);
  p.planes = planes_of(op, "x", x);
  p.relu = relu;
  check_vector(op, "mean", mean, x.size(1), x);
  check_vector(op, "rstd", rstd, x.size(1), x);
  check_vector(op, "weight", weight, x.size(1), x);
  check_vector(op, "bias", bias, x.size(1), x);
  check_same(op, "skip", skip, x);

  Launch run(op, x);
  Tensor y = torch::stable::empty_like(x);
  Tensor mask = torch::stable::new_empty(x, {keep_mask ? mask_bytes(x) : 0}, ScalarType::Byte);
  p.x = run.in(x); p.mean = run.in(mean); p.rstd = run.in(rstd); p.weight = run.in(weight); p.bias = run.in(bias);
  p.skip = run.in(skip); p.y = run.out(y); p.mask = run.out(mask);
  run.done(launch_bn_apply(p, run.stream()));
  return {y, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> bn_act_backward(
    const std::vector<Tensor>& grads,  // 1 to 4 of [N, C, ...]
    const OptTensor& mask,             // [ceil(numel / 8)]
    const Tensor& x,                   // [N, C, ...]
    const Tensor& mean,                // [C]
    const Tensor& rstd,                // [C]
    const OptTensor& weight,           // [C]
    bool batch_statistics,
    bool need_x,
    bool need_params,
    bool need_skip) {                  // -> gx [N, C, ...], gweight [C], gbias [C], gskip [N, C, ...]; each or [0]
  const char* op = "bn_act_backward";
  BnBackwardParams p{};
  p.dtype = dtype_of(x, op);
  p.planes = planes_of(op, "x", x);
  p.batch_statistics = batch_statistics;
  p.grads = static_cast<int>(grads.size());
  STD_TORCH_CHECK(p.grads >= 1 && p.grads <= BnBackwardParams::kMostGrads, op, ": takes 1 to ", BnBackwardParams::kMostGrads, " gradients, got ", p.grads);
  for (const Tensor& g : grads) check_same(op, "grads", g, x);
  check_vector(op, "mean", mean, x.size(1), x);
  check_vector(op, "rstd", rstd, x.size(1), x);
  check_vector(op, "weight", weight, x.size(1), x);
  if (mask.has_value()) {
    check_device(op, "mask", *mask, x);
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte && mask->numel() == mask_bytes(x) && mask->is_contiguous(), op, ": mask must hold ", mask_bytes(x), " bytes");
  }
  // a gradient of skip alone comes from the first pass too
  const bool sums = need_params || (need_x && batch_statistics) || (need_skip && !need_x);

  Launch run(op, x);
  Tensor gx = need_x ? torch::stable::empty_like(x) : nothing(x);
  Tensor gskip = need_skip ? torch::stable::empty_like(x) : nothing(x);
  const int64_t channels = sums ? x.size(1) : 0;
  Tensor gweight = acc_vector(x, channels), gbias = acc_vector(x, channels);
  if (x.numel() == 0) {  // the sums over nothing; no kernel runs
    torch::stable::zero_(gweight);
    torch::stable::zero_(gbias);
  } else {
    p.slabs = slabs_of(p.planes, x);
    Tensor partial = acc_vector(x, 2 * p.slabs * channels), means = acc_vector(x, 2 * channels);
    for (int k = 0; k < p.grads; ++k) p.g[k] = run.in(grads[static_cast<size_t>(k)]);
    p.mask = run.in(mask); p.x = run.in(x); p.mean = run.in(mean); p.rstd = run.in(rstd); p.weight = run.in(weight);
    p.partial = run.out(partial); p.means = run.out(means); p.gweight = run.out(gweight); p.gbias = run.out(gbias);
    p.gx = run.out(gx);
    // several gradients are read once: the first pass leaves their sum for the second, where gx will be if nowhere else
    p.joined = need_skip ? run.out(gskip) : sums && p.grads > 1 ? p.gx : nullptr;
    run.done(launch_bn_backward(p, run.stream()));
  }
  if (need_params) return {gx, gweight, gbias, gskip};
  return {gx, acc_vector(x, 0), acc_vector(x, 0), gskip};
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def("bn_statistics(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, float momentum, float eps, Tensor? known_mean=None, Tensor? known_rstd=None, int first=0) -> (Tensor, Tensor)");
  m.def("bn_apply(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? skip, bool relu, bool keep_mask) -> (Tensor, Tensor)");
  m.def("bn_act_backward(Tensor[] grads, Tensor? mask, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool batch_statistics, bool need_x, bool need_params, bool need_skip) -> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("bn_statistics", TORCH_BOX(&fisnet::bn_statistics));
  m.impl("bn_apply", TORCH_BOX(&fisnet::bn_apply));
  m.impl("bn_act_backward", TORCH_BOX(&fisnet::bn_act_backward));
}
