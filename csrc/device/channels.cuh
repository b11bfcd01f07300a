// Per-channel reductions over dense tensors in either memory format. Deterministic: each thread adds in a fixed order,
// a block reduces through shared memory, slabs are added in order by `finish_channel_sums_kernel`.
#pragma once
#include "layout.h"
#include "numeric.cuh"

namespace fisnet {
// Whether `channel_values` can serve vectors of `width` elements.
inline bool channel_vectors(const Planes& p, int width) { return p.inner == 1 ? p.channels % width == 0 : p.inner >= width; }

// W neighbouring per-channel values from `from`, which sits on a 16-byte boundary when W > 1.
template <int W, typename A>
__device__ __forceinline__ void neighbours(A (&out)[W], const A* __restrict__ from) {
  if constexpr (W == 1) {
    out[0] = *from;
  } else {
    FISNET_UNROLL
    for (int i = 0; i < W; i += kVec<A>) {
      const Pack<A> pack = *reinterpret_cast<const Pack<A>*>(from + i);
      FISNET_UNROLL
      for (int j = 0; j < kVec<A>; ++j) out[i + j] = pack.part[j];
    }
  }
}

// The per-channel values beside the W elements from `at` of one sample; `values` sits on a 16-byte boundary when W > 1. 32-bit
// arithmetic, because one sample has fewer than 2^31 elements (a 64-bit division is a subroutine call on a GPU, and costs
// registers around it).
template <int W, typename A>
__device__ __forceinline__ void channel_values(A (&out)[W], const A* __restrict__ values, const Planes& p, int64_t at) {
  const uint32_t place = static_cast<uint32_t>(at);
  if (p.inner == 1) {
    neighbours(out, values + place % static_cast<uint32_t>(p.channels));
  } else {  // one channel, or the end of one and the start of the next
    const uint32_t inner = static_cast<uint32_t>(p.inner), c = place / inner, left = inner - (place - c * inner);
    const A here = values[c], next = values[c + 1 < static_cast<uint32_t>(p.channels) ? c + 1 : c];
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) out[i] = static_cast<uint32_t>(i) < left ? here : next;
  }
}

// The same for a vector that `each_of_channel` hands out, which starts in channel c.
template <int W, typename A>
__device__ __forceinline__ void values_of_channel(A (&out)[W], const A* __restrict__ values, const Planes& p, int c) {
  if (p.inner == 1) {
    neighbours(out, values + c);
  } else {
    const A here = values[c];
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) out[i] = here;
  }
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

// total[sum][channel] = partial[0][sum][channel] + partial[1][sum][channel] + ...
// A block owns blockDim.x totals; its rows of threads take every blockDim.y-th slab, in order, and row 0 adds the rows' sums
// in order. At most 256 threads. Shared memory: one double a thread. Deterministic.
// no 16-byte loads and stores: a few kilobytes, one value a thread
template <typename A>
__global__ void __launch_bounds__(256) finish_channel_sums_kernel(const A* __restrict__ partial, A* __restrict__ total, int slabs, int count) {
  FISNET_SHARED(double, rows, 256);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y), width = static_cast<int>(blockDim.x);
  const int j = static_cast<int>(blockIdx.x) * width + x;
  double t = 0;
  if (j < count) {
#pragma unroll 8
    for (int s = y; s < slabs; s += static_cast<int>(blockDim.y)) t += static_cast<double>(partial[static_cast<int64_t>(s) * count + j]);
  }
  rows[y * width + x] = t;
  __syncthreads();
  if (y || j >= count) return;
  for (int r = 1; r < static_cast<int>(blockDim.y); ++r) t += rows[r * width + x];
  total[j] = static_cast<A>(t);
}

// Launches it with a shape that keeps many slabs in flight; `count` is sums times channels. Returns a cudaError_t.
template <typename A>
int finish_channel_sums(const void* partial, void* total, int slabs, int count, cudaStream_t stream) {
  const dim3 block(8, 32);  // 32 bytes of float32 a row: what one memory access moves
  const dim3 grid(static_cast<unsigned>(ceil_div(count, 8)));
  return static_cast<int>(launch(finish_channel_sums_kernel<A>, grid, block, 0, stream, static_cast<const A*>(partial), static_cast<A*>(total), slabs, count));
}
}  // namespace fisnet
