// The z^B rule of a 2-d convolution over few input channels, and its adjoint. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
// The layer: a square kernel with one stride and one padding for both axes, no groups, no dilation.
struct ZbLayer {
  int64_t samples;
  int maps;                     // K
  int c_in, c_out;
  int height, width;            // of x
  int out_height, out_width;    // of z
  int kernel, stride, padding;
  int64_t x_channel, x_pixel;   // strides of x and of the input's relevance inside a sample, by channel and by pixel
  bool channels_last;           // layout of z and of all that is shaped like it

  static constexpr int kMaxIn = 4;

  constexpr int phases() const { return stride * stride; }
  constexpr int taps() const { return kernel * kernel; }
  // Taps an input position meets along one axis: kernel = phase + stride * tap.
  constexpr int phase_taps() const { return (kernel + stride - 1) / stride; }
  // Output positions whose window may leave the image, at each end of an axis.
  constexpr int edge() const { return (kernel - 1 + stride - 1) / stride; }
  // Positions along an axis with different windows: the edges one by one, and everything between them.
  constexpr int classes(int size) const { return size < 2 * edge() + 1 ? size : 2 * edge() + 1; }
  constexpr int64_t boxes() const { return static_cast<int64_t>(classes(out_height)) * classes(out_width) * c_out; }

  template <class F> void each(F&& f) {
    f(field("samples", samples)); f(field("maps", maps)); f(field("c_in", c_in)); f(field("c_out", c_out));
    f(field("height", height)); f(field("width", width)); f(field("out_height", out_height)); f(field("out_width", out_width));
    f(field("kernel", kernel)); f(field("stride", stride)); f(field("padding", padding));
    f(field("x_channel", x_channel)); f(field("x_pixel", x_pixel)); f(field("channels_last", channels_last));
  }
};

// ---- sizes of the scratch memory, in elements; `size` is that of one element in bytes -----------------------------------
constexpr int zb_chunk(int size) { return 64 / size; }                  // output channels at once, forward
constexpr int zb_columns(int size) { return size == 8 ? 8 : 32; }       // output channels at once, adjoint
constexpr int zb_rows(int size) { return size == 8 ? 16 : 32; }         // output channels at once, weight gradient
constexpr int kZbSums = 16;                                             // sums a weight position has, see zb_wgrad_kernel
// [chunk][tap of a phase][(phase, channel, sign)][output channel]
inline int64_t zb_packed(const ZbLayer& l, int size) {
  const int columns = (l.phases() * l.c_in * 2 + 7) / 8 * 8;
  const int64_t chunks = (l.c_out + zb_chunk(size) - 1) / zb_chunk(size);
  return chunks * l.phase_taps() * l.phase_taps() * columns * zb_chunk(size);
}
// [chunk][output channel][(tap, channel, sign) up to a multiple of 16]
constexpr int zb_depth(const ZbLayer& l) { return (l.taps() + 1) / 2 * 16; }
inline int64_t zb_packed_backward(const ZbLayer& l, int size) {
  const int64_t chunks = (l.c_out + zb_columns(size) - 1) / zb_columns(size);
  return chunks * zb_columns(size) * zb_depth(l);
}
// Slabs of partial sums of the weight gradient: few enough that they stay small, and enough blocks to fill a GPU.
int zb_slabs(const ZbLayer& l, int size);
inline int64_t zb_partial(const ZbLayer& l) { return static_cast<int64_t>(l.c_out) * l.taps() * kZbSums; }

struct ZbParams {
  DType dtype;
  ZbLayer layer;
  double eps;
  const void* R_out;    // [samples, maps, c_out, out_height, out_width]; relevance, or relevance per unit of carrier
  const void* carrier;  // [samples, c_out, out_height, out_width] or null
  const void* z;        // [samples, c_out, out_height, out_width]
  const void* x;        // [samples, c_in, height, width]
  const void* W;        // [c_out, c_in, kernel, kernel]
  const void* shift;    // [c_out] accumulation type, or null
  const void* low;      // [c_in] accumulation type
  const void* high;     // [c_in] accumulation type
  void* packed;         // [zb_packed]; scratch
  void* box;            // [layer.boxes()] accumulation type; scratch
  void* R;              // [samples, maps, c_in, height, width]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); layer.each(f); f(field("eps", eps)); f(field("R_out", R_out)); f(field("carrier", carrier));
    f(field("z", z)); f(field("x", x)); f(field("W", W)); f(field("shift", shift)); f(field("low", low)); f(field("high", high));
    f(field("packed", packed)); f(field("box", box)); f(field("R", R));
  }
};

struct ZbBackwardParams {
  DType dtype;
  ZbLayer layer;
  double eps;
  const void* R_bar;    // [samples, maps, c_in, height, width]
  const void* R_out;    // [samples, maps, c_out, out_height, out_width]; what the forward got
  const void* carrier;  // [samples, c_out, out_height, out_width] or null
  const void* z;        // [samples, c_out, out_height, out_width]
  const void* x;        // [samples, c_in, height, width]
  const void* W;        // [c_out, c_in, kernel, kernel]
  const void* shift;    // [c_out] accumulation type, or null
  const void* low;      // [c_in] accumulation type
  const void* high;     // [c_in] accumulation type
  void* packed;         // [zb_packed_backward]; scratch
  void* box;            // [layer.boxes()] accumulation type; scratch
  void* R_out_bar;      // [samples, maps, c_out, out_height, out_width]
  void* carrier_bar;    // [samples, c_out, out_height, out_width], or null without carrier
  int slabs;            // zb_slabs(layer)
  void* partial;        // [slabs, zb_partial] accumulation type, or null; scratch for W_bar
  void* W_bar;          // [c_out, c_in, kernel, kernel] or null
  void* shift_bar;      // [c_out] accumulation type or null; only with W_bar

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); layer.each(f); f(field("eps", eps)); f(field("R_bar", R_bar)); f(field("R_out", R_out));
    f(field("carrier", carrier)); f(field("z", z)); f(field("x", x)); f(field("W", W)); f(field("shift", shift));
    f(field("low", low)); f(field("high", high)); f(field("packed", packed)); f(field("box", box));
    f(field("R_out_bar", R_out_bar)); f(field("carrier_bar", carrier_bar)); f(field("slabs", slabs));
    f(field("partial", partial)); f(field("W_bar", W_bar)); f(field("shift_bar", shift_bar));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_zb(const ZbParams& p, void* stream);
int launch_zb_backward(const ZbBackwardParams& p, void* stream);
}  // namespace fisnet
