// How kernels see tensors: dense memory as maps beside activations, or as channel planes. Torch-free, CUDA-free.
#pragma once
#include <algorithm>
#include <cstdint>

namespace fisnet {
// Relevance [samples, maps, size] beside activations [samples, size]; size counts the elements of one sample.
struct Maps {
  int64_t samples;
  int maps;  // K
  int64_t size;

  // Whether every sample starts on a multiple of `width` elements.
  bool vectors(int width) const { return samples * maps <= 1 || size % width == 0; }
};

// A dense tensor by channel: element (o, c, i) lies at (o * channels + c) * inner + i.
// contiguous [N, C, ...]: outer = N, inner = H W;  channels_last: outer = N H W, inner = 1.
struct Planes {
  int64_t outer;
  int channels;
  int64_t inner;

  int64_t numel() const { return outer * channels * inner; }
  // Whether `width` consecutive elements always share one channel, or have consecutive ones that start at a multiple of it.
  bool vectors(int width) const { return inner == 1 ? channels % width == 0 : inner % width == 0; }
};

// The grid of a per-channel reduction: blocks of x by y threads, `tiles` over channels and `slabs` over everything else.
// Each slab leaves one partial sum a channel, and a second kernel adds the slabs in order: deterministic.
struct ChannelGrid {
  int x, y, tiles, slabs;

  static constexpr int kThreads = 256;
  static ChannelGrid of(const Planes& p, int width) {
    ChannelGrid g{};
    if (p.inner == 1) {  // neighbouring threads take neighbouring channels
      const int vectors = (p.channels + width - 1) / width;
      g.x = 1;
      while (g.x < 32 && g.x < vectors) g.x *= 2;
      g.tiles = (vectors + g.x - 1) / g.x;
    } else {  // a block takes one channel
      g.x = kThreads;
      g.tiles = p.channels;
    }
    g.y = kThreads / g.x;
    // enough blocks to fill a GPU several times over, but never fewer than 4 vectors a thread
    const int64_t rows = p.inner == 1 ? p.outer : p.outer * p.inner / width;
    const int per_block = p.inner == 1 ? g.y : g.x;
    const int64_t most = std::max<int64_t>(1, rows / (4 * per_block));
    g.slabs = static_cast<int>(std::min<int64_t>({most, std::max(1, 2048 / std::max(1, g.tiles)), 512}));
    return g;
  }
};
}  // namespace fisnet
