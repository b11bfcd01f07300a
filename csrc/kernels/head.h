// The classifier's head: the start of relevance at the logits, and its way through a global average pool. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
// Selective ISNet's start. Accumulation type: float, or double for double.
struct EtaStartParams {
  DType dtype;        // of logits and logits_bar
  int64_t samples;
  int maps, classes;
  double eta_eps;
  const void* logits;  // [samples, classes]
  const void* index;   // [samples, maps] int64
  void* start;         // [samples, maps, classes] accumulation type

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", samples)); f(field("maps", maps)); f(field("classes", classes)); f(field("eta_eps", eta_eps));
    f(field("logits", logits)); f(field("index", index)); f(field("start", start));
  }
};

struct EtaStartBackwardParams {
  DType dtype;
  int64_t samples;
  int maps, classes;
  double eta_eps;
  const void* start_bar;  // [samples, maps, classes] accumulation type
  const void* logits;     // [samples, classes]
  const void* index;      // [samples, maps] int64
  void* P_bar;            // [samples, classes] accumulation type; scratch
  void* logits_bar;       // [samples, classes]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("samples", samples)); f(field("maps", maps)); f(field("classes", classes)); f(field("eta_eps", eta_eps));
    f(field("start_bar", start_bar)); f(field("logits", logits)); f(field("index", index)); f(field("P_bar", P_bar)); f(field("logits_bar", logits_bar));
  }
};

// Dual's z+ start at the last dense layer.
struct PlusStartParams {
  DType dtype;
  int64_t rows;
  int classes;
  double eps;
  const void* P;      // [rows, classes], >= 0
  const void* bias;   // [classes] or null
  const void* s_bar;  // [rows, classes]; null: out is s, else P_bar
  void* out;          // [rows, classes]

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("rows", rows)); f(field("classes", classes)); f(field("eps", eps));
    f(field("P", P)); f(field("bias", bias)); f(field("s_bar", s_bar)); f(field("out", out));
  }
};

// A global average pool's transpose and the rules at the ReLU before it; with z_plus both of Dual's (then maps = 1).
struct PooledPhiParams {
  DType dtype;
  bool channels_last;
  int64_t samples;
  int maps, channels, pixels;
  double eps;          // absolute epsilon; used when eps_n is null
  double eps_plus;
  const void* eps_n;   // [samples] relative epsilon, or null
  const void* g;       // [samples, maps, channels]
  const void* g_plus;  // [samples, channels]; with z_plus
  const void* a;       // [samples, channels, pixels], >= 0
  const void* z_plus;  // [samples, channels, pixels] or null
  void* s;             // [samples, maps, channels, pixels]
  void* s_plus;        // [samples, channels, pixels] or null; with z_plus

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("channels_last", channels_last)); f(field("samples", samples)); f(field("maps", maps)); f(field("channels", channels)); f(field("pixels", pixels));
    f(field("eps", eps)); f(field("eps_plus", eps_plus)); f(field("eps_n", eps_n)); f(field("g", g)); f(field("g_plus", g_plus)); f(field("a", a)); f(field("z_plus", z_plus));
    f(field("s", s)); f(field("s_plus", s_plus));
  }
};

struct PooledPhiBackwardParams {
  DType dtype;
  bool channels_last;
  int64_t samples;
  int maps, channels, pixels;
  double eps;
  double eps_plus;
  const void* eps_n;       // [samples] or null
  const void* s_bar;       // [samples, maps, channels, pixels]
  const void* s_plus_bar;  // [samples, channels, pixels]; with z_plus
  const void* g;           // [samples, maps, channels]
  const void* g_plus;      // [samples, channels]; with z_plus
  const void* a;           // [samples, channels, pixels]
  const void* z_plus;      // [samples, channels, pixels] or null
  void* g_bar;             // [samples, maps, channels]
  void* g_plus_bar;        // [samples, channels]; with z_plus
  void* a_bar;             // [samples, channels, pixels] or null
  void* z_plus_bar;        // [samples, channels, pixels]; with z_plus

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("channels_last", channels_last)); f(field("samples", samples)); f(field("maps", maps)); f(field("channels", channels)); f(field("pixels", pixels));
    f(field("eps", eps)); f(field("eps_plus", eps_plus)); f(field("eps_n", eps_n)); f(field("s_bar", s_bar)); f(field("s_plus_bar", s_plus_bar));
    f(field("g", g)); f(field("g_plus", g_plus)); f(field("a", a)); f(field("z_plus", z_plus));
    f(field("g_bar", g_bar)); f(field("g_plus_bar", g_plus_bar)); f(field("a_bar", a_bar)); f(field("z_plus_bar", z_plus_bar));
  }
};

// All return a cudaError_t. `stream` is a cudaStream_t.
int launch_eta_start(const EtaStartParams& p, void* stream);
int launch_eta_start_backward(const EtaStartBackwardParams& p, void* stream);
int launch_plus_start(const PlusStartParams& p, void* stream);
int launch_pooled_phi(const PooledPhiParams& p, void* stream);
int launch_pooled_phi_backward(const PooledPhiBackwardParams& p, void* stream);
}  // namespace fisnet
