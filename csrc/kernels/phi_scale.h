// LRP-epsilon at a ReLU, in gradient form, and its adjoint. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
struct PhiScaleParams {
  DType dtype;
  Planes planes;        // of a and, with samples * maps, of the relevance
  Maps shape;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [samples] relative epsilon, or null
  const void* g;        // [samples, maps, size]
  const void* a;        // [samples, size], >= 0
  const void* skip;     // [samples, maps, size] or null
  const void* scale;    // [channels] accumulation type, or null
  const void* rest;     // [samples, maps, size] or null; with scale
  void* s;              // [samples, maps, size]; null when scale is given and s need not be kept
  void* out;            // [samples, maps, size]; null without scale

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("g", g)); f(field("a", a)); f(field("skip", skip));
    f(field("scale", scale)); f(field("rest", rest)); f(field("s", s)); f(field("out", out));
  }
};

struct PhiScaleBackwardParams {
  DType dtype;
  Planes planes;        // of a
  Maps shape;
  double eps;           // absolute epsilon; used when eps_n is null
  const void* eps_n;    // [samples] relative epsilon, or null
  const void* s_bar;    // [samples, maps, size]; the adjoint of out when scale is given
  const void* join;     // [samples, maps, size] or null: what a second consumer gave, added to s_bar
  const void* s;        // [samples, maps, size]; null when neither a_bar nor scale_bar is wanted
  const void* a;        // [samples, size]
  const void* scale;    // [channels] accumulation type, or null
  void* g_bar;          // [samples, maps, size] or null
  void* a_bar;          // [samples, size] or null
  int slabs;            // of partial: ChannelGrid::of(planes, width).slabs
  void* partial;        // [slabs, channels] accumulation type, or null; scratch for scale_bar
  void* scale_bar;      // [channels] accumulation type, or null

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("s_bar", s_bar)); f(field("join", join)); f(field("s", s)); f(field("a", a));
    f(field("scale", scale)); f(field("g_bar", g_bar)); f(field("a_bar", a_bar)); f(field("slabs", slabs));
    f(field("partial", partial)); f(field("scale_bar", scale_bar));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_phi_scale(const PhiScaleParams& p, void* stream);
int launch_phi_scale_backward(const PhiScaleBackwardParams& p, void* stream);
}  // namespace fisnet
