// What the ops over linear maps share: a map from the shapes of its operands, and their checks.
#pragma once
#include "../device/linear.h"
#include "maps.h"
#include "new_tensor.h"

namespace fisnet {
// A 4-d tensor whose memory is [N, H, W, C]. (A dense layer's [N, C] comes as [N, C, 1, 1].)
inline void check_nhwc(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4, op, ": ", name, " must be [N, C, H, W], got ", t.dim(), " axes");
  STD_TORCH_CHECK(t.numel() == 0 || channels_inside(t), op, ": ", name, " must be dense and channels_last");
  STD_TORCH_CHECK(t.size(0) * t.size(2) * t.size(3) <= kMostRows, op, ": ", name, " has more than 2^31 - 128 positions");
}
// The same, like `like` in device and dtype, with these sizes.
inline void check_map(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t samples, int64_t channels, int64_t height, int64_t width) {
  check_like(op, name, t, like);
  check_nhwc(op, name, t);
  STD_TORCH_CHECK(
      t.size(0) == samples && t.size(1) == channels && t.size(2) == height && t.size(3) == width, op, ": ", name, " must be [", samples, ", ", channels, ", ", height,
      ", ", width, "], got [", t.size(0), ", ", t.size(1), ", ", t.size(2), ", ", t.size(3), "]");
}
inline void check_map(const char* op, const char* name, const OptTensor& t, const Tensor& like, int64_t samples, int64_t channels, int64_t height, int64_t width) {
  if (t.has_value()) check_map(op, name, *t, like, samples, channels, height, width);
}

// The same for some neighbouring channels of such a map; returns the channels from one position to the next.
inline int check_slice(const char* op, const char* name, const Tensor& t, const Tensor& like, int64_t samples, int64_t channels, int64_t height, int64_t width) {
  check_like(op, name, t, like);
  STD_TORCH_CHECK(
      t.dim() == 4 && t.size(0) == samples && t.size(1) == channels && t.size(2) == height && t.size(3) == width, op, ": ", name, " must be [", samples, ", ", channels,
      ", ", height, ", ", width, "], got [", t.dim() > 0 ? t.size(0) : 0, ", ", t.dim() > 1 ? t.size(1) : 0, ", ", t.dim() > 2 ? t.size(2) : 0, ", ", t.dim() > 3 ? t.size(3) : 0, "]");
  const int64_t pitch = width > 1 ? t.stride(3) : height > 1 ? t.stride(2) : samples > 1 ? t.stride(0) : channels;
  const auto fits = [&](int64_t d, int64_t stride) { return t.size(d) <= 1 || t.stride(d) == stride; };
  const bool dense = fits(1, 1) && fits(3, pitch) && fits(2, pitch * width) && fits(0, pitch * width * height);
  STD_TORCH_CHECK(t.numel() == 0 || (dense && pitch >= channels), op, ": ", name, " must be channels_last, or neighbouring channels of such a map");
  STD_TORCH_CHECK(pitch <= std::numeric_limits<int32_t>::max(), op, ": ", name, " has too many channels");
  return static_cast<int>(pitch);
}

// Stride, padding and dilation of both axes, as operators take them.
#define FISNET_GEOMETRY_ARGS int64_t stride_y, int64_t stride_x, int64_t pad_y, int64_t pad_x, int64_t dilation_y, int64_t dilation_x
#define FISNET_GEOMETRY stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x
#define FISNET_GEOMETRY_SCHEMA "int stride_y, int stride_x, int pad_y, int pad_x, int dilation_y, int dilation_x"

// The map with weight W [c_out, c_in, kernel_y, kernel_x] and inputs of height x width, for `samples` of them.
inline LinearMap linear_map(const char* op, const Tensor& W, int64_t samples, int64_t height, int64_t width, FISNET_GEOMETRY_ARGS) {
  check_nhwc(op, "W", W);
  STD_TORCH_CHECK(W.numel() <= std::numeric_limits<int32_t>::max(), op, ": W has more than 2^31 - 1 elements");
  const auto check_positions = [&](int64_t h, int64_t w) {
    const double positions = static_cast<double>(samples) * static_cast<double>(h) * static_cast<double>(w);
    STD_TORCH_CHECK(h >= 0 && w >= 0 && positions <= kMostRows, op, ": ", samples, " samples of ", h, " x ", w, " are too many positions, or fewer than none");
  };
  check_positions(height, width);
  STD_TORCH_CHECK(stride_y >= 1 && stride_x >= 1 && dilation_y >= 1 && dilation_x >= 1 && pad_y >= 0 && pad_x >= 0, op, ": stride and dilation must be at least 1, padding at least 0");
  const auto out = [](int64_t size, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    const int64_t room = size + 2 * pad - dilation * (kernel - 1) - 1;
    return room < 0 ? int64_t{0} : room / stride + 1;
  };
  const int64_t out_height = out(height, W.size(2), stride_y, pad_y, dilation_y), out_width = out(width, W.size(3), stride_x, pad_x, dilation_x);
  check_positions(out_height, out_width);
  const auto i = [](int64_t v) { return static_cast<int>(v); };
  LinearMap l{};
  l.samples = i(samples); l.height = i(height); l.width = i(width); l.c_in = i(W.size(1)); l.c_out = i(W.size(0));
  l.kernel_y = i(W.size(2)); l.kernel_x = i(W.size(3));
  l.out_height = i(out_height); l.out_width = i(out_width);
  l.stride_y = i(stride_y); l.stride_x = i(stride_x); l.pad_y = i(pad_y); l.pad_x = i(pad_x); l.dilation_y = i(dilation_y); l.dilation_x = i(dilation_x);
  return l;
}

// Two products or two operands have no 128x128.
inline TileShape tile_shape(const char* op, int64_t tile, bool pair = false) {
  STD_TORCH_CHECK(tile >= (pair ? 1 : 0) && tile <= 2, op, ": there is no tile shape ", tile);
  return static_cast<TileShape>(tile);
}

// K, where relevance has N K samples beside an activation of N.
inline int maps_beside(const char* op, int64_t samples, const Tensor& a) {
  const int64_t n = a.size(0);
  STD_TORCH_CHECK(n ? samples % n == 0 : samples == 0, op, ": relevance must be [N*K, ...] over the activation's [N, ...]");
  return n ? static_cast<int>(samples / n) : 1;
}

// A result [samples, channels, height, width] in [N, H, W, C] memory; `poison` fills it with NaN, so that what is not written shows.
inline Tensor new_map(const Tensor& like, int64_t samples, int64_t channels, int64_t height, int64_t width, bool poison) {
  Tensor t = empty_of(like, {samples, channels, height, width}, like.scalar_type(), true);
  if (poison) torch::stable::fill_(t, std::numeric_limits<double>::quiet_NaN());
  return t;
}
}  // namespace fisnet
