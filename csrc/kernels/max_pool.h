// 2-d max pools: the winner takes all, forward and transposed, and the transpose fused with LRP-epsilon's phi. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
// A pool's windows. Window (oh, ow) holds the pixels (oh stride - pad + kh dilation, ow stride - pad + kw dilation) that lie
// in the image. A winner is one byte, kh * kernel_w + kw: hence at most 256 pixels a window.
struct Windows {
  int in_h, in_w, out_h, out_w;
  int kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;

  template <class F> void each(F&& f) {
    f(field("in_h", in_h)); f(field("in_w", in_w)); f(field("out_h", out_h)); f(field("out_w", out_w));
    f(field("kernel_h", kernel_h)); f(field("kernel_w", kernel_w)); f(field("stride_h", stride_h)); f(field("stride_w", stride_w));
    f(field("pad_h", pad_h)); f(field("pad_w", pad_w)); f(field("dilation_h", dilation_h)); f(field("dilation_w", dilation_w));
  }
};

// In all structs: dense tensors, all contiguous or all channels_last; fewer than 2^31 elements a sample.
struct MaxPoolParams {
  DType dtype;
  bool channels_last;
  int64_t samples;
  int channels;
  Windows windows;
  const void* x;  // [samples, channels, in_h, in_w]
  void* y;        // [samples, channels, out_h, out_w]
  void* winners;  // [samples, channels, out_h, out_w] bytes

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("channels_last", channels_last)); f(field("samples", samples)); f(field("channels", channels));
    windows.each(f);
    f(field("x", x)); f(field("y", y)); f(field("winners", winners));
  }
};

struct MaxPoolScatterParams {
  DType dtype;
  bool channels_last;
  int64_t samples;
  int maps;
  int channels;
  Windows windows;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [samples] relative epsilon, or null
  const void* g;        // [samples, maps, channels, out_h, out_w]
  const void* winners;  // [samples, channels, out_h, out_w] bytes
  const void* a;        // [samples, channels, in_h, in_w], >= 0, or null: no phi
  const void* skip;     // [samples, maps, channels, in_h, in_w] or null; with a
  void* out;            // [samples, maps, channels, in_h, in_w]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("channels_last", channels_last)); f(field("samples", samples)); f(field("maps", maps)); f(field("channels", channels));
    windows.each(f);
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("g", g)); f(field("winners", winners)); f(field("a", a)); f(field("skip", skip)); f(field("out", out));
  }
};

struct MaxPoolGatherParams {
  DType dtype;
  bool channels_last;
  int64_t samples;
  int maps;
  int channels;
  Windows windows;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [samples] relative epsilon, or null
  const void* s_bar;    // [samples, maps, channels, in_h, in_w]
  const void* winners;  // [samples, channels, out_h, out_w] bytes
  const void* a;        // [samples, channels, in_h, in_w] or null: no phi
  const void* s;        // [samples, maps, channels, in_h, in_w]; null unless a_bar is wanted
  void* g_bar;          // [samples, maps, channels, out_h, out_w]
  void* a_bar;          // [samples, channels, in_h, in_w] or null; with a
  void* skip_bar;       // [samples, maps, channels, in_h, in_w] or null; with a

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("channels_last", channels_last)); f(field("samples", samples)); f(field("maps", maps)); f(field("channels", channels));
    windows.each(f);
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("s_bar", s_bar)); f(field("winners", winners)); f(field("a", a)); f(field("s", s));
    f(field("g_bar", g_bar)); f(field("a_bar", a_bar)); f(field("skip_bar", skip_bar));
  }
};

// All return a cudaError_t. `stream` is a cudaStream_t.
int launch_max_pool(const MaxPoolParams& p, void* stream);
int launch_max_pool_scatter(const MaxPoolScatterParams& p, void* stream);
int launch_max_pool_gather(const MaxPoolGatherParams& p, void* stream);
}  // namespace fisnet
