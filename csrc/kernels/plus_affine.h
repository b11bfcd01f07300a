// z+ through a BatchNorm that reads several maps, and its adjoint. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
struct PlusAffineParams {
  DType dtype;
  Planes planes;  // of P
  Maps shape;
  double eps;     // of the z+ rule
  const void* R;  // [samples, maps, size]
  const void* P;  // [samples, size]
  const void* u;  // [samples, size] or null (M = 0)
  const void* k;  // [channels] accumulation type
  const void* c;  // [channels] accumulation type
  void* plus;     // [samples, maps, size]
  void* minus;    // [samples, maps, size]; null without u
  void* s;        // [samples, maps, size]
  void* den;      // [samples, size], the denominator

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size)); f(field("eps", eps));
    f(field("R", R)); f(field("P", P)); f(field("u", u)); f(field("k", k)); f(field("c", c));
    f(field("plus", plus)); f(field("minus", minus)); f(field("s", s)); f(field("den", den));
  }
};

struct PlusAffineBackwardParams {
  DType dtype;
  Planes planes;          // of P
  Maps shape;
  const void* plus_bar;   // [samples, maps, size]
  const void* minus_bar;  // [samples, maps, size] or null (0)
  const void* s;          // [samples, maps, size]
  const void* den;        // [samples, size]
  const void* P;          // [samples, size]
  const void* u;          // [samples, size] or null
  const void* k;          // [channels] accumulation type
  void* R_bar;            // [samples, maps, size]
  void* P_bar;            // [samples, size]
  void* u_bar;            // [samples, size]; null without u
  int slabs;              // of partial
  void* partial;          // [slabs, 2, channels] accumulation type, scratch
  void* sums;             // [2, channels] accumulation type: k_bar, c_bar

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("plus_bar", plus_bar)); f(field("minus_bar", minus_bar)); f(field("s", s)); f(field("den", den));
    f(field("P", P)); f(field("u", u)); f(field("k", k)); f(field("R_bar", R_bar)); f(field("P_bar", P_bar));
    f(field("u_bar", u_bar)); f(field("slabs", slabs)); f(field("partial", partial)); f(field("sums", sums));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_plus_affine(const PlusAffineParams& p, void* stream);
int launch_plus_affine_backward(const PlusAffineBackwardParams& p, void* stream);
}  // namespace fisnet
