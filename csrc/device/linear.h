// Convolutions and dense layers as kernels see them. Torch-free, CUDA-free.
#pragma once
#include "registry.h"

namespace fisnet {
// y[n, p, q, o] = sum over (r, s, c) of W[o, r, s, c] x[n, p stride_y - pad_y + r dilation_y, q stride_x - pad_x + s dilation_x, c]
// x [samples, height, width, c_in], y [samples, out_height, out_width, c_out], W [c_out, kernel_y, kernel_x, c_in], channels
// innermost. A dense layer is a 1x1 convolution over maps of 1x1. Rows (samples times positions), of x and of y, are at most kMostRows:
// the end of the last tile is an int, too.
constexpr int kMostRows = 0x7fffffff - 127;
struct LinearMap {
  int samples;
  int height, width, c_in;
  int out_height, out_width, c_out;
  int kernel_y, kernel_x;
  int stride_y, stride_x;
  int pad_y, pad_x;
  int dilation_y, dilation_x;

  template <typename F> void each(F&& f) {
    f(field("samples", samples)); f(field("height", height)); f(field("width", width)); f(field("c_in", c_in));
    f(field("out_height", out_height)); f(field("out_width", out_width)); f(field("c_out", c_out));
    f(field("kernel_y", kernel_y)); f(field("kernel_x", kernel_x)); f(field("stride_y", stride_y)); f(field("stride_x", stride_x));
    f(field("pad_y", pad_y)); f(field("pad_x", pad_x)); f(field("dilation_y", dilation_y)); f(field("dilation_x", dilation_x));
  }
};
}  // namespace fisnet
