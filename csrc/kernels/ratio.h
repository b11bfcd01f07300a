// The stabilised division of every rule in ratio form, and its adjoint. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
struct RatioParams {
  DType dtype;
  Maps shape;
  double eps;         // absolute epsilon; used when eps_n is null
  const void* eps_n;  // [samples] relative epsilon, or null
  bool nonneg;        // z >= 0 everywhere
  const void* R;      // [samples, maps, size]
  const void* z;      // [samples, size]
  void* s;            // [samples, maps, size]
  void* den;          // [samples, size], the denominator

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("nonneg", nonneg)); f(field("R", R)); f(field("z", z));
    f(field("s", s)); f(field("den", den));
  }
};

struct RatioBackwardParams {
  DType dtype;
  Maps shape;
  const void* s_bar;  // [samples, maps, size]
  const void* s;      // [samples, maps, size]; null without z_bar
  const void* den;    // [samples, size]
  void* R_bar;        // [samples, maps, size]
  void* z_bar;        // [samples, size] or null

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("s_bar", s_bar)); f(field("s", s)); f(field("den", den)); f(field("R_bar", R_bar)); f(field("z_bar", z_bar));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_ratio(const RatioParams& p, void* stream);
int launch_ratio_backward(const RatioBackwardParams& p, void* stream);
}  // namespace fisnet
