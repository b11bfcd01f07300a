// The heatmap loss of ISNet with GWRP, and its adjoint. Torch-free.
#pragma once
#include <algorithm>
#include <cmath>

#include "../device/registry.h"

namespace fisnet {
// Relevance maps beside masks. A row is one channel of one map: rows = samples * maps * channels.
struct HeatmapShape {
  int64_t samples;
  int maps;           // K
  int channels;       // C
  int mask_channels;  // 1 or C
  int pixels;
  bool interleaved;   // R lies as [samples, maps, pixels, channels], else [samples, maps, channels, pixels]
  bool mask_bytes;    // mask of bytes, else of accumulation values

  constexpr int64_t rows() const { return samples * maps * channels; }
  template <class F> void each(F&& f) {
    f(field("samples", samples)); f(field("maps", maps)); f(field("channels", channels)); f(field("mask_channels", mask_channels));
    f(field("pixels", pixels)); f(field("interleaved", interleaved)); f(field("mask_bytes", mask_bytes));
  }
};

// The weights d^i / sum_j d^j of the k largest values.
struct Ranking {
  int k;          // how many; 0: the mean of all (d = 1)
  double log2_d;  // 0 when d = 0, where k = 1
  double scale;   // 1 / sum_j d^j

  static Ranking of(double d, int k) {
    if (k == 0 || d == 0) return {k, 0.0, 1.0};
    return {k, std::log2(d), (1 - d) / -std::expm1(k * std::log(d))};
  }
  template <class F> void each(F&& f) { f(field("k", k)); f(field("log2_d", log2_d)); f(field("scale", scale)); }
};

// How a row is ranked, by its size and the size of an item (key and index).
enum class GwrpPath { kMean, kWarp, kBlock, kChunks };
struct GwrpPlan {
  GwrpPath path;
  int sorted;    // items sorted together: a power of two
  int capacity;  // items that a block holds in shared memory
  int chunks;    // of `sorted` items, merged in global memory

  static constexpr int kMostSorted = 4096;
  static constexpr int kMostShared = 86 * 1024;  // bytes of items: two blocks of an H100 multiprocessor, one of any since sm_80
  static GwrpPlan of(int pixels, int k, int item_bytes) {
    const auto power = [](int n) { int p = 8; while (p < n) p *= 2; return p; };
    if (k == 0) return {GwrpPath::kMean, 0, 0, 0};
    if (pixels <= 256) return {GwrpPath::kWarp, power(pixels), std::max(32, power(pixels)), 1};
    if (k > kMostSorted) return {GwrpPath::kChunks, kMostSorted, kMostSorted, (pixels + kMostSorted - 1) / kMostSorted};
    const int sorted = power(k), most = kMostShared / item_bytes;  // at least kMostSorted
    // More than is sorted, so that a coarse histogram suffices to collect what may be among the k largest.
    const int room = pixels <= most ? std::max(pixels, sorted) : std::min(most, std::max(2 * sorted, 2048));
    return {GwrpPath::kBlock, sorted, (room + 31) / 32 * 32, 1};
  }
};

enum Foreground { kHybrid = 0, kL2 = 1, kL1 = 2 };
enum Normalization { kAbsRoIMean = 0, kRoIMean = 1, kNone = 2 };

struct HeatmapLossParams {
  DType dtype;              // of R
  HeatmapShape shape;
  Ranking ranking;
  double E;
  double c1, c2;            // used where the pointers are null
  int c1_count, c2_count;   // 1 or maps
  int foreground, normalization;
  const void* R;            // [samples, maps, channels, pixels], see shape.interleaved
  const void* mask;         // [samples, mask_channels, pixels]
  const void* c1_k;         // [c1_count] accumulation type, or null
  const void* c2_k;         // [c2_count] accumulation type, or null
  void* sums;               // [rows, 4] accumulation type, scratch: |R| M, R M, M, G before normalisation
  void* background;         // [samples] accumulation type
  void* foreground_loss;    // [samples] accumulation type
  void* slope_G;            // [rows] accumulation type: d background / d G before normalisation
  void* slope_F;            // [samples, maps, 2] accumulation type: d background / d sum over the foreground, d foreground / d F
  void* index;              // [rows, k] int32: the pixels by rank, or null
  void* key_a;              // [rows, pixels] keys, scratch of GwrpPath::kChunks; else null
  void* key_b;
  void* index_a;            // [rows, pixels] int32, likewise
  void* index_b;

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); shape.each(f); ranking.each(f); f(field("E", E)); f(field("c1", c1)); f(field("c2", c2));
    f(field("c1_count", c1_count)); f(field("c2_count", c2_count)); f(field("foreground", foreground)); f(field("normalization", normalization));
    f(field("R", R)); f(field("mask", mask)); f(field("c1_k", c1_k)); f(field("c2_k", c2_k)); f(field("sums", sums));
    f(field("background", background)); f(field("foreground_loss", foreground_loss)); f(field("slope_G", slope_G)); f(field("slope_F", slope_F));
    f(field("index", index)); f(field("key_a", key_a)); f(field("key_b", key_b)); f(field("index_a", index_a)); f(field("index_b", index_b));
  }
};

struct HeatmapLossBackwardParams {
  DType dtype;                 // of R and R_bar
  HeatmapShape shape;
  Ranking ranking;
  int normalization;
  int64_t background_step;     // between the values of background_bar: 0 or 1
  int64_t foreground_step;
  const void* background_bar;  // [samples] accumulation type
  const void* foreground_bar;  // [samples] accumulation type
  const void* R;               // as in the forward, as are the four below
  const void* mask;
  const void* slope_G;
  const void* slope_F;
  const void* index;
  void* R_bar;                 // laid out as R

  template <class F> void each(F&& f) {
    f(field("dtype", dtype)); shape.each(f); ranking.each(f); f(field("normalization", normalization));
    f(field("background_step", background_step)); f(field("foreground_step", foreground_step));
    f(field("background_bar", background_bar)); f(field("foreground_bar", foreground_bar)); f(field("R", R)); f(field("mask", mask));
    f(field("slope_G", slope_G)); f(field("slope_F", slope_F)); f(field("index", index)); f(field("R_bar", R_bar));
  }
};

// Both return a cudaError_t. `stream` is a cudaStream_t.
int launch_heatmap_loss(const HeatmapLossParams& p, void* stream);
int launch_heatmap_loss_backward(const HeatmapLossBackwardParams& p, void* stream);
}  // namespace fisnet
