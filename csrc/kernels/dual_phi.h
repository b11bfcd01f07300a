// Both rules of Dual at a ReLU, LRP-epsilon and z+, and their adjoint. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
struct DualPhiParams {
  DType dtype;
  Maps shape;          // maps = 1
  double eps;          // of the epsilon rule, absolute; used when eps_n is null
  const void* eps_n;   // [samples] relative epsilon, or null
  double eps_plus;     // of the z+ rule
  const void* g;       // [samples, size]
  const void* g_plus;  // [samples, size]
  const void* a;       // [samples, size], >= 0
  const void* z_plus;  // [samples, size], >= 0
  void* s;             // [samples, size]
  void* s_plus;        // [samples, size]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("eps_plus", eps_plus));
    f(field("g", g)); f(field("g_plus", g_plus)); f(field("a", a)); f(field("z_plus", z_plus));
    f(field("s", s)); f(field("s_plus", s_plus));
  }
};

struct DualPhiBackwardParams {
  DType dtype;
  Maps shape;              // maps = 1
  double eps;              // of the epsilon rule, absolute; used when eps_n is null
  const void* eps_n;       // [samples] relative epsilon, or null
  double eps_plus;         // of the z+ rule
  const void* s_bar;       // [samples, size]
  const void* s_plus_bar;  // [samples, size]
  const void* a;           // [samples, size]
  const void* s;           // [samples, size]
  const void* s_plus;      // [samples, size]
  const void* z_plus;      // [samples, size]
  void* g_bar;             // [samples, size]
  void* g_plus_bar;        // [samples, size]
  void* a_bar;             // [samples, size]
  void* z_plus_bar;        // [samples, size]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", shape.samples)); f(field("maps", shape.maps)); f(field("size", shape.size));
    f(field("eps", eps)); f(field("eps_n", eps_n)); f(field("eps_plus", eps_plus));
    f(field("s_bar", s_bar)); f(field("s_plus_bar", s_plus_bar)); f(field("a", a)); f(field("s", s)); f(field("s_plus", s_plus));
    f(field("z_plus", z_plus)); f(field("g_bar", g_bar)); f(field("g_plus_bar", g_plus_bar)); f(field("a_bar", a_bar));
    f(field("z_plus_bar", z_plus_bar));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_dual_phi(const DualPhiParams& p, void* stream);
int launch_dual_phi_backward(const DualPhiBackwardParams& p, void* stream);
}  // namespace fisnet
