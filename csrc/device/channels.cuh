// Per-channel reductions over dense tensors in either memory format. Deterministic: each thread adds in a fixed order,
// a block reduces through shared memory, slabs are added in order by `finish_channel_sums_kernel`.
#pragma once
#include "layout.h"
#include "numeric.cuh"

namespace fisnet {
// The channel of element `at` of one sample; 32-bit arithmetic, because one sample has fewer than 2^31 elements (a 64-bit
// division is a subroutine call on a GPU, and costs registers around it).
__device__ __forceinline__ int channel_of(const Planes& p, int64_t at) {
  return static_cast<int>(static_cast<uint32_t>(at) / static_cast<uint32_t>(p.inner) % static_cast<uint32_t>(p.channels));
}

// Calls f(position, offset, channel) for every vector of W elements that this thread owns: `position` counts (sample, pixel),
// `offset` is the place of the first element in memory and `channel` its channel. Launch with grid (tiles, slabs), block
// (x, y) of ChannelGrid. See Planes::vectors for when W > 1 is right. Positions are fewer than 2^31.
template <int W, typename F>
__device__ __forceinline__ void each_of_channel(const Planes& p, F&& f) {
  if (p.inner == 1) {
    const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (c >= p.channels) return;
    const uint32_t step = gridDim.y * blockDim.y, rows = static_cast<uint32_t>(p.outer);
    for (uint32_t row = blockIdx.y * blockDim.y + threadIdx.y; row < rows; row += step) f(row, static_cast<int64_t>(row) * p.channels + c, c);
  } else {
    const int c = static_cast<int>(blockIdx.x);
    const uint32_t inner = static_cast<uint32_t>(p.inner), count = static_cast<uint32_t>(p.outer) * inner, step = gridDim.y * blockDim.x * W;
    for (uint32_t at = (blockIdx.y * blockDim.x + threadIdx.x) * W; at < count; at += step) {
      const uint32_t o = at / inner;
      f(at, (static_cast<int64_t>(o) * p.channels + c) * inner + (at - o * inner), c);
    }
  }
}

// Adds the threads' sums [kSums][W] of one block and writes partial[slab][sum][channel]. Every thread must call it.
template <int kSums, int W, typename A>
__device__ __forceinline__ void store_channel_partials(const Planes& p, const A (&sum)[kSums][W], A* __restrict__ partial) {
  FISNET_SHARED(A, part, ChannelGrid::kThreads * W);
  const int tid = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  FISNET_UNROLL
  for (int s = 0; s < kSums; ++s) {
    A* const to = partial + (static_cast<int64_t>(blockIdx.y) * kSums + s) * p.channels;
    if (p.inner == 1) {  // over threadIdx.y, for each of the tile's channels
      const int width = static_cast<int>(blockDim.x) * W;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) part[static_cast<int>(threadIdx.y) * width + static_cast<int>(threadIdx.x) * W + i] = sum[s][i];
      __syncthreads();
      for (int j = tid; j < width; j += ChannelGrid::kThreads) {
        A total = 0;
        for (int y = 0; y < static_cast<int>(blockDim.y); ++y) total += part[y * width + j];
        const int c = static_cast<int>(blockIdx.x) * width + j;
        if (c < p.channels) to[c] = total;
      }
    } else {  // one channel: over all threads, as a tree
      A mine = 0;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) mine += sum[s][i];
      part[tid] = mine;
      __syncthreads();
      for (int half = ChannelGrid::kThreads / 2; half; half /= 2) {
        if (tid < half) part[tid] += part[tid + half];
        __syncthreads();
      }
      if (tid == 0) to[blockIdx.x] = part[0];
    }
    __syncthreads();
  }
}

// total[sum][channel] = partial[0][sum][channel] + partial[1][sum][channel] + ...; one thread a total.
// no 16-byte loads and stores: a few kilobytes, one value a thread
template <typename A>
__global__ void __launch_bounds__(256) finish_channel_sums_kernel(const A* __restrict__ partial, A* __restrict__ total, int slabs, int count) {
  const int j = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (j >= count) return;
  double t = 0;
  for (int s = 0; s < slabs; ++s) t += static_cast<double>(partial[static_cast<int64_t>(s) * count + j]);
  total[j] = static_cast<A>(t);
}
}  // namespace fisnet
