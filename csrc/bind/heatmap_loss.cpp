#include "../kernels/heatmap_loss.h"

#include <algorithm>

#include "common.h"

namespace fisnet {
namespace {
bool is_bytes(const Tensor& mask) { return mask.scalar_type() == ScalarType::Byte || mask.scalar_type() == ScalarType::Bool; }

// R [N*K, C, ...] and mask [N, 1 or C, ...]; R contiguous or channels_last, mask contiguous.
HeatmapShape shape_of(const char* op, const Tensor& R, const Tensor& mask) {
  check_device(op, "mask", mask, R);
  STD_TORCH_CHECK(is_bytes(mask) || mask.scalar_type() == acc_type(R), op, ": mask must be bool, uint8 or ", torch::headeronly::toString(acc_type(R)));
  STD_TORCH_CHECK(R.dim() >= 3 && mask.dim() == R.dim() && mask.is_contiguous(), op, ": R must be [N*K, C, ...] and mask a contiguous [N, 1 or C, ...]");
  const Planes planes = planes_of(op, "R", R);
  HeatmapShape s{};
  s.samples = mask.size(0);
  s.maps = s.samples ? static_cast<int>(R.size(0) / s.samples) : 1;
  s.channels = planes.channels;
  s.mask_channels = static_cast<int>(mask.size(1));
  int64_t pixels = 1;
  bool fits = s.samples * s.maps == R.size(0) && (mask.size(1) == 1 || mask.size(1) == R.size(1));
  for (int64_t d = 2; d < R.dim(); ++d) {
    pixels *= R.size(d);
    fits = fits && mask.size(d) == R.size(d);
  }
  STD_TORCH_CHECK(fits && pixels > 0 && s.channels > 0, op, ": mask must be [N, 1 or C, ...] over R [N*K, C, ...] with pixels");
  s.pixels = static_cast<int>(pixels);
  s.interleaved = !R.is_contiguous();
  s.mask_bytes = is_bytes(mask);
  const int64_t blocks = (pixels + 255) / 256;
  STD_TORCH_CHECK(s.rows() * blocks <= std::numeric_limits<int32_t>::max(), op, ": R has too many rows of pixels");
  return s;
}
// Whether there are k numbers to rank; k = 0 asks for the mean.
void check_ranks(const char* op, int64_t k, const HeatmapShape& s) { STD_TORCH_CHECK(0 <= k && k <= s.pixels, op, ": k must be in 0 ... ", s.pixels, ", got ", k); }

const void* range_end(const Launch& run, const char* op, const char* name, const OptTensor& c, const HeatmapShape& s, const Tensor& R, int& count) {
  count = 1;
  if (!c.has_value()) return nullptr;
  count = static_cast<int>(c->numel());
  check_vector(op, name, c, count == 1 ? 1 : s.maps, R);
  return run.in(c);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> heatmap_loss(
    const Tensor& R,        // [N*K, C, ...]
    const Tensor& mask,     // [N, 1 or C, ...]
    double d,
    int64_t k,
    double E,
    double c1,
    double c2,
    const OptTensor& c1_k,  // [1] or [K]
    const OptTensor& c2_k,  // [1] or [K]
    int64_t foreground,
    int64_t normalization,
    bool keep) {            // -> background [N], foreground [N], slope_G [N*K*C], slope_F [N*K, 2], index [N*K*C, k] or [0]
  const char* op = "heatmap_loss";
  HeatmapLossParams p{};
  p.dtype = dtype_of(R, op);
  p.shape = shape_of(op, R, mask);
  check_ranks(op, k, p.shape);
  p.ranking = Ranking::of(d, static_cast<int>(k));
  p.E = E; p.c1 = c1; p.c2 = c2;
  p.foreground = static_cast<int>(foreground);
  p.normalization = static_cast<int>(normalization);

  Launch run(op, R);
  const int64_t rows = R.size(0) * R.size(1);
  Tensor background = acc_vector(R, p.shape.samples), foreground_loss = acc_vector(R, p.shape.samples);
  Tensor slope_G = acc_vector(R, rows), sums = acc_vector(R, rows * 4);
  Tensor slope_F = torch::stable::new_empty(R, {R.size(0), 2}, acc_type(R));
  Tensor index = keep && k ? torch::stable::new_empty(R, {rows, k}, ScalarType::Int) : torch::stable::new_empty(R, {0}, ScalarType::Int);
  const bool wide_keys = p.dtype == DType::f64;
  const int64_t merged = GwrpPlan::of(p.shape.pixels, p.ranking.k, wide_keys ? 12 : 8).path == GwrpPath::kChunks ? rows * p.shape.pixels : 0;
  const auto scratch = [&](ScalarType type) { return torch::stable::new_empty(R, {merged}, type); };
  const ScalarType key_type = wide_keys ? ScalarType::Long : ScalarType::Int;
  Tensor key_a = scratch(key_type), key_b = scratch(key_type), index_a = scratch(ScalarType::Int), index_b = scratch(ScalarType::Int);
  p.R = run.in(R); p.mask = run.in(mask);
  p.c1_k = range_end(run, op, "c1", c1_k, p.shape, R, p.c1_count);
  p.c2_k = range_end(run, op, "c2", c2_k, p.shape, R, p.c2_count);
  p.sums = run.out(sums); p.background = run.out(background); p.foreground_loss = run.out(foreground_loss);
  p.slope_G = run.out(slope_G); p.slope_F = run.out(slope_F); p.index = run.out(index);
  p.key_a = run.out(key_a); p.key_b = run.out(key_b); p.index_a = run.out(index_a); p.index_b = run.out(index_b);
  run.done(launch_heatmap_loss(p, run.stream()));
  return {background, foreground_loss, slope_G, slope_F, index};
}

// The distance between the values of a cotangent [N], which may be one value expanded.
int64_t step_of(const char* op, const char* name, const Tensor& bar, const HeatmapShape& s, const Tensor& R) {
  check_device(op, name, bar, R);
  STD_TORCH_CHECK(bar.scalar_type() == acc_type(R) && bar.dim() == 1 && bar.size(0) == s.samples, op, ": ", name, " must be [N] of ", torch::headeronly::toString(acc_type(R)));
  STD_TORCH_CHECK(bar.is_contiguous() || bar.stride(0) == 0, op, ": ", name, " must be contiguous, or one value expanded");
  return bar.size(0) > 1 ? bar.stride(0) : 0;
}

Tensor heatmap_loss_backward(
    const Tensor& background_bar,  // [N]
    const Tensor& foreground_bar,  // [N]
    const Tensor& R,               // [N*K, C, ...]
    const Tensor& mask,            // [N, 1 or C, ...]
    const Tensor& slope_G,         // [N*K*C]
    const Tensor& slope_F,         // [N*K, 2]
    const Tensor& index,           // [N*K*C, k] or [0]
    double d,
    int64_t k,
    int64_t normalization) {       // -> R_bar, as R
  const char* op = "heatmap_loss_backward";
  HeatmapLossBackwardParams p{};
  p.dtype = dtype_of(R, op);
  p.shape = shape_of(op, R, mask);
  check_ranks(op, k, p.shape);
  p.ranking = Ranking::of(d, static_cast<int>(k));
  p.normalization = static_cast<int>(normalization);
  p.background_step = step_of(op, "background_bar", background_bar, p.shape, R);
  p.foreground_step = step_of(op, "foreground_bar", foreground_bar, p.shape, R);
  const int64_t rows = R.size(0) * R.size(1);
  check_vector(op, "slope_G", slope_G, rows, R);
  check_vector(op, "slope_F", slope_F, R.size(0) * 2, R);
  check_device(op, "index", index, R);
  STD_TORCH_CHECK(index.scalar_type() == ScalarType::Int && index.numel() == rows * k && index.is_contiguous(), op, ": index must be [N*K*C, k] int32");

  Launch run(op, R);
  Tensor R_bar = torch::stable::empty_like(R);
  p.background_bar = run.in(background_bar); p.foreground_bar = run.in(foreground_bar); p.R = run.in(R); p.mask = run.in(mask);
  p.slope_G = run.in(slope_G); p.slope_F = run.in(slope_F); p.index = run.in(index);
  p.R_bar = run.out(R_bar);
  run.done(launch_heatmap_loss_backward(p, run.stream()));
  return R_bar;
}
}  // namespace
}  // namespace fisnet

#if !defined(FISNET_EMU)
STABLE_TORCH_LIBRARY_FRAGMENT(fisnet, m) {
  m.def(
      "heatmap_loss(Tensor R, Tensor mask, float d, int k, float E, float c1, float c2, Tensor? c1_k, Tensor? c2_k, int foreground, int normalization, bool keep) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "heatmap_loss_backward(Tensor background_bar, Tensor foreground_bar, Tensor R, Tensor mask, Tensor slope_G, Tensor slope_F, Tensor index, float d, int k, int normalization) "
      "-> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(fisnet, FISNET_KEY, m) {
  m.impl("heatmap_loss", TORCH_BOX(&fisnet::heatmap_loss));
  m.impl("heatmap_loss_backward", TORCH_BOX(&fisnet::heatmap_loss_backward));
}
