// BatchNorm + addition + ReLU: statistics, forward, and the backward that joins the gradients of several consumers. Torch-free.
#pragma once
#include "../device/layout.h"
#include "../device/registry.h"

namespace fisnet {
struct BnStatisticsParams {
  DType dtype;             // of x
  DType running_dtype;     // of running_mean and running_var
  Planes planes;           // of x
  double momentum;
  double eps;
  const void* x;           // [outer, channels, inner]
  int slabs;               // of partial: ChannelGrid::of(planes, width).slabs
  void* partial;           // [slabs, 4, channels] accumulation type; scratch
  int whole;               // channels of the results: those of x, and the known ones on both sides of them
  int first;               // where x's channels start in the results
  const void* known_mean;  // [whole - channels] accumulation type, or null where there are none
  const void* known_rstd;  // [whole - channels] accumulation type, or null; with the same eps
  void* mean;              // [whole] accumulation type
  void* rstd;              // [whole] accumulation type
  void* running_mean;      // [whole] or null; updated in place
  void* running_var;       // [whole] or null; updated in place

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("running_dtype", running_dtype));
    f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("momentum", momentum)); f(field("eps", eps)); f(field("x", x)); f(field("slabs", slabs)); f(field("partial", partial));
    f(field("whole", whole)); f(field("first", first)); f(field("known_mean", known_mean)); f(field("known_rstd", known_rstd));
    f(field("mean", mean)); f(field("rstd", rstd)); f(field("running_mean", running_mean)); f(field("running_var", running_var));
  }
};

struct BnApplyParams {
  DType dtype;
  Planes planes;        // of x, y and skip
  bool relu;
  const void* x;        // [outer, channels, inner]
  const void* mean;     // [channels] accumulation type
  const void* rstd;     // [channels] accumulation type
  const void* weight;   // [channels] accumulation type, or null
  const void* bias;     // [channels] accumulation type, or null
  const void* skip;     // [outer, channels, inner] or null
  void* y;              // [outer, channels, inner]
  void* mask;           // [ceil(numel / 8)] bytes or null; bit i of byte j: y[8 j + i] > 0, in memory order

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("relu", relu)); f(field("x", x)); f(field("mean", mean)); f(field("rstd", rstd)); f(field("weight", weight));
    f(field("bias", bias)); f(field("skip", skip)); f(field("y", y)); f(field("mask", mask));
  }
};

struct BnBackwardParams {
  static constexpr int kMostGrads = 4;

  DType dtype;
  Planes planes;               // of x and every gradient
  bool batch_statistics;       // mean and rstd are functions of x (train mode)
  int grads;                   // 1 to kMostGrads
  const void* g[kMostGrads];   // [outer, channels, inner] each: what the consumers of y hand back
  const void* mask;            // [ceil(numel / 8)] bytes or null: no ReLU
  const void* x;               // [outer, channels, inner]
  const void* mean;            // [channels] accumulation type
  const void* rstd;            // [channels] accumulation type
  const void* weight;          // [channels] accumulation type, or null
  void* joined;                // [outer, channels, inner] the masked sum of g (the gradient of skip), or null
  int slabs;                   // of partial: ChannelGrid::of(planes, width).slabs
  void* partial;               // [slabs, 2, channels] accumulation type, or null: no sums are wanted
  void* gweight;               // [channels] accumulation type; with partial
  void* gbias;                 // [channels] accumulation type; with partial
  void* means;                 // [2, channels] accumulation type; scratch, with partial
  void* gx;                    // [outer, channels, inner] or null

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); f(field("outer", planes.outer)); f(field("channels", planes.channels)); f(field("inner", planes.inner));
    f(field("batch_statistics", batch_statistics)); f(field("grads", grads));
    f(field("g0", g[0])); f(field("g1", g[1])); f(field("g2", g[2])); f(field("g3", g[3]));
    f(field("mask", mask)); f(field("x", x)); f(field("mean", mean)); f(field("rstd", rstd)); f(field("weight", weight));
    f(field("joined", joined)); f(field("slabs", slabs)); f(field("partial", partial)); f(field("gweight", gweight));
    f(field("gbias", gbias)); f(field("means", means)); f(field("gx", gx));
  }
};

// All return a cudaError_t. `stream` is a cudaStream_t.
int launch_bn_statistics(const BnStatisticsParams& p, void* stream);
int launch_bn_apply(const BnApplyParams& p, void* stream);
// Two passes over memory where sums are wanted (`partial`), else one. `joined` may be the memory of `gx`, and with several
// gradients and batch statistics it is needed: the second pass reads the sum that the first one wrote.
int launch_bn_backward(const BnBackwardParams& p, void* stream);
}  // namespace fisnet
