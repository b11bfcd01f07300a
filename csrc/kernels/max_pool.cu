#include "max_pool.h"

#include <cmath>

#include "../device/bytes.cuh"
#include "../device/maps.cuh"
#include "../device/phi.cuh"
#include "phi_scale.h"

namespace fisnet {
namespace {
// Where a thread's W elements lie in one sample of a [C, H, W] tensor: pixel (h, w), channels from `channel`.
struct Place {
  int channel, h, w;
};
__device__ __forceinline__ Place place_of(bool channels_last, int channels, int height, int width, int64_t at) {
  const uint32_t i = static_cast<uint32_t>(at), C = static_cast<uint32_t>(channels), pixels = static_cast<uint32_t>(height * width);
  const uint32_t c = channels_last ? i % C : i / pixels, pixel = channels_last ? i / C : i % pixels;
  const uint32_t h = pixel / static_cast<uint32_t>(width);
  return {static_cast<int>(c), static_cast<int>(h), static_cast<int>(pixel - h * static_cast<uint32_t>(width))};
}

// One axis of the window that starts at `start`: its positions [first, last) lie in the image.
struct Range {
  int first, last;
};
__device__ __forceinline__ Range inside(int start, int kernel, int dilation, int size) {
  const int first = start < 0 ? (dilation - 1 - start) / dilation : 0;
  const int last = size > start ? (size - start + dilation - 1) / dilation : 0;
  return {first, last < kernel ? last : kernel};
}

// One axis of the windows that may hold the pixel at `padded` (its index plus the padding): [first, last).
__device__ __forceinline__ Range covering(int padded, int kernel, int dilation, int stride, int out) {
  const int reach = (kernel - 1) * dilation, last = padded / stride + 1;
  return {padded > reach ? (padded - reach + stride - 1) / stride : 0, last < out ? last : out};
}

// Calls use(u, y, x) for the positions of rows by columns, in order, and before that fetch(u, y, x) for up to kAhead of them at
// a time, numbered by u: their loads are under way together.
constexpr int kAhead = 4;  // a 2x2 window at once
template <typename Fetch, typename Use>
__device__ __forceinline__ void each_position(const Range& rows, const Range& columns, Fetch&& fetch, Use&& use) {
  if (columns.first >= columns.last) return;
  int y = rows.first, x = columns.first;
  while (y < rows.last) {
    int ys[kAhead], xs[kAhead];
    FISNET_UNROLL
    for (int u = 0; u < kAhead; ++u) {
      ys[u] = y;
      xs[u] = x;
      if (y < rows.last) fetch(u, y, x);
      if (++x == columns.last) {
        x = columns.first;
        ++y;
      }
    }
    FISNET_UNROLL
    for (int u = 0; u < kAhead; ++u)
      if (ys[u] < rows.last) use(u, ys[u], xs[u]);
  }
}

// y = max over the window; the first of equals wins, and a NaN wins over everything (as in PyTorch).
// A thread owns W channels of one output pixel (W = 1 in contiguous tensors) of every gridDim.y-th sample: neighbouring
// threads read neighbouring addresses. No shared memory; windows that overlap find their pixels in the caches.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) max_pool_kernel(MaxPoolParams p) {
  using A = Acc<T>;
  const Windows& v = p.windows;
  const int64_t in_size = static_cast<int64_t>(p.channels) * v.in_h * v.in_w, out_size = static_cast<int64_t>(p.channels) * v.out_h * v.out_w;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * W;
  if (at >= out_size) return;
  const Place o = place_of(p.channels_last, p.channels, v.out_h, v.out_w, at);
  const int h0 = o.h * v.stride_h - v.pad_h, w0 = o.w * v.stride_w - v.pad_w;
  const Range rows = inside(h0, v.kernel_h, v.dilation_h, v.in_h), columns = inside(w0, v.kernel_w, v.dilation_w, v.in_w);
  const int step = p.channels_last ? p.channels : 1;  // from pixel to pixel
  const int base = p.channels_last ? o.channel : o.channel * v.in_h * v.in_w;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    const T* const x = static_cast<const T*>(p.x) + n * in_size + base;
    A best[W];
    int winner[W];
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      best[i] = static_cast<A>(-INFINITY);
      winner[i] = rows.first * v.kernel_w + columns.first;
    }
    Raw<T, W> values[kAhead];
    each_position(rows, columns,
      [&](int u, int kh, int kw) { values[u].fetch(x, ((h0 + kh * v.dilation_h) * v.in_w + w0 + kw * v.dilation_w) * step); },
      [&](int u, int kh, int kw) {
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) {
          const A value = values[u][i];
          if (value > best[i] || value != value) {
            best[i] = value;
            winner[i] = kh * v.kernel_w + kw;
          }
        }
      });
    store<T, W>(static_cast<T*>(p.y) + n * out_size + at, best);
    RawBytes<W> winners;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) winners.set(i, static_cast<unsigned>(winner[i]));
    winners.put(static_cast<uint8_t*>(p.winners) + n * out_size + at);
  }
}

// The transpose, as a gather: out[pixel] = sum of g over the windows whose winner the pixel is; with a,
// s = a / (a + e) . (that + skip), LRP-epsilon at the ReLU before the pool.
// A thread owns W channels of one input pixel (W = 1 in contiguous tensors) of every gridDim.y-th sample, and all K maps. It
// visits the windows that cover the pixel in order of rows and columns: no atomics, deterministic. Accumulates in float32
// (float64 for float64). No shared memory: the windows' g and winners are read again by neighbouring pixels, from the caches.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 3) max_pool_scatter_kernel(MaxPoolScatterParams p) {
  using A = Acc<T>;
  const Windows& v = p.windows;
  const int64_t in_size = static_cast<int64_t>(p.channels) * v.in_h * v.in_w, out_size = static_cast<int64_t>(p.channels) * v.out_h * v.out_w;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * W;
  if (at >= in_size) return;
  const Place o = place_of(p.channels_last, p.channels, v.in_h, v.in_w, at);
  const int top = o.h + v.pad_h, left = o.w + v.pad_w;
  const Range rows = covering(top, v.kernel_h, v.dilation_h, v.stride_h, v.out_h);
  const Range columns = covering(left, v.kernel_w, v.dilation_w, v.stride_w, v.out_w);
  const int step = p.channels_last ? p.channels : 1;
  const int base = p.channels_last ? o.channel : o.channel * v.out_h * v.out_w;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    const uint8_t* const winners = static_cast<const uint8_t*>(p.winners) + n * out_size + base;
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      const T* const g = static_cast<const T*>(p.g) + map * out_size + base;
      // `a` again for every map, from the cache: before the loop, it would be waited for before anything else is read
      const Raw<T, W> a = fetch<W>(static_cast<const T*>(p.a), n * in_size + at), skip = fetch<W>(static_cast<const T*>(p.skip), map * in_size + at);
      A sum[W] = {};
      Raw<T, W> share[kAhead];
      RawBytes<W> winner[kAhead];
      each_position(rows, columns,
        [&](int u, int oh, int ow) {
          const int window = (oh * v.out_w + ow) * step;
          winner[u].fetch(winners + window);
          share[u].fetch(g, window);
        },
        [&](int u, int oh, int ow) {
          int kh = top - oh * v.stride_h, kw = left - ow * v.stride_w;
          if (v.dilation_h > 1) {
            if (kh % v.dilation_h) return;
            kh /= v.dilation_h;
          }
          if (v.dilation_w > 1) {
            if (kw % v.dilation_w) return;
            kw /= v.dilation_w;
          }
          const unsigned mine = static_cast<unsigned>(kh * v.kernel_w + kw);
          FISNET_UNROLL
          for (int i = 0; i < W; ++i) sum[i] += winner[u][i] == mine ? share[u][i] : A(0);
        });
      if (p.a) {
        const A e = eps_of<T>(p.eps, p.eps_n, n);
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) sum[i] = (sum[i] + skip[i]) * phi(gated(a[i], e), e);
      }
      store<T, W>(static_cast<T*>(p.out) + map * in_size + at, sum);
    }
  }
}

// The adjoint: g_bar[window] = s_bar[its winner], times phi(a) there when the transpose was fused with phi.
// A thread owns W channels of one window of every gridDim.y-th sample, and all K maps. With W > 1 it walks through the whole
// window as the forward does, so that its accesses stay wide and in order; with W = 1 it goes straight to the winner. A
// winner outside the image (a window of padding alone) gives 0. No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 2) max_pool_gather_kernel(MaxPoolGatherParams p) {
  using A = Acc<T>;
  const Windows& v = p.windows;
  const int64_t in_size = static_cast<int64_t>(p.channels) * v.in_h * v.in_w, out_size = static_cast<int64_t>(p.channels) * v.out_h * v.out_w;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kMapThreads + threadIdx.x) * W;
  if (at >= out_size) return;
  const Place o = place_of(p.channels_last, p.channels, v.out_h, v.out_w, at);
  const int h0 = o.h * v.stride_h - v.pad_h, w0 = o.w * v.stride_w - v.pad_w;
  const int step = p.channels_last ? p.channels : 1;
  const int base = p.channels_last ? o.channel : o.channel * v.in_h * v.in_w;
  const Range rows = inside(h0, v.kernel_h, v.dilation_h, v.in_h), columns = inside(w0, v.kernel_w, v.dilation_w, v.in_w);
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    RawBytes<W> winner;
    winner.fetch(static_cast<const uint8_t*>(p.winners) + n * out_size + at);
    const T* const a = p.a ? static_cast<const T*>(p.a) + n * in_size + base : nullptr;
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      const T* const s_bar = static_cast<const T*>(p.s_bar) + map * in_size + base;
      A found[W] = {}, at_winner[W] = {};  // s_bar and a there
      if constexpr (W == 1) {
        const int kh = static_cast<int>(winner[0]) / v.kernel_w, kw = static_cast<int>(winner[0]) - kh * v.kernel_w;
        if (kh >= rows.first && kh < rows.last && kw >= columns.first && kw < columns.last) {
          const int pixel = ((h0 + kh * v.dilation_h) * v.in_w + w0 + kw * v.dilation_w) * step;
          if (a) load<T, W>(at_winner, a + pixel);
          load<T, W>(found, s_bar + pixel);
        }
      } else {
        Raw<T, W> values[kAhead], activations[kAhead];
        each_position(rows, columns,
          [&](int u, int kh, int kw) {
            const int pixel = ((h0 + kh * v.dilation_h) * v.in_w + w0 + kw * v.dilation_w) * step;
            values[u].fetch(s_bar, pixel);
            activations[u].fetch(a, pixel);
          },
          [&](int u, int kh, int kw) {
            FISNET_UNROLL
            for (int i = 0; i < W; ++i) {
              if (winner[i] != static_cast<unsigned>(kh * v.kernel_w + kw)) continue;
              found[i] = values[u][i];
              at_winner[i] = activations[u][i];
            }
          });
      }
      if (a) {
        const A e = eps_of<T>(p.eps, p.eps_n, n);
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) found[i] *= phi(gated(at_winner[i], e), e);
      }
      store<T, W>(static_cast<T*>(p.g_bar) + map * out_size + at, found);
    }
  }
}

// Vectors of W run over channels: only in channels_last, and where all start on 16 bytes.
template <typename T, typename P> bool wide(const P& p) { return p.channels_last && p.channels % kVec<T> == 0; }

// Where a thread's elements lie takes as long to work out as they take to read: once for up to 8 samples, where blocks are many.
dim3 pool_grid(const Maps& m, int width) {
  dim3 grid = map_grid(m, width);
  for (unsigned most = 8; most > 1 && grid.y > 1 && static_cast<int64_t>(grid.x) * grid.y >= 4096; most /= 2) grid.y = (grid.y + 1) / 2;
  return grid;
}

template <typename T, int W>
int forward(const MaxPoolParams& p, cudaStream_t stream) {
  const Maps out{p.samples, 1, static_cast<int64_t>(p.channels) * p.windows.out_h * p.windows.out_w};
  return static_cast<int>(launch(max_pool_kernel<T, W>, pool_grid(out, W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int scatter(const MaxPoolScatterParams& p, cudaStream_t stream) {
  const Maps in{p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.in_h * p.windows.in_w};
  return static_cast<int>(launch(max_pool_scatter_kernel<T, W>, pool_grid(in, W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int gather(const MaxPoolGatherParams& p, cudaStream_t stream) {
  const Maps out{p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.out_h * p.windows.out_w};
  return static_cast<int>(launch(max_pool_gather_kernel<T, W>, pool_grid(out, W), dim3(kMapThreads), 0, stream, p));
}
template <typename P> bool no_pixels(const P& p) {
  const Windows& v = p.windows;
  return p.samples == 0 || p.channels == 0 || v.in_h == 0 || v.in_w == 0 || v.out_h == 0 || v.out_w == 0;
}
}  // namespace

int launch_max_pool(const MaxPoolParams& p, void* stream) {
  if (no_pixels(p)) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return wide<T>(p) && aligned16(p.x, p.y, p.winners) ? forward<T, kVec<T>>(p, st) : forward<T, 1>(p, st);
  });
}

int launch_max_pool_scatter(const MaxPoolScatterParams& p, void* stream) {
  if (no_pixels(p) || p.maps == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return wide<T>(p) && aligned16(p.g, p.winners, p.a, p.skip, p.out) ? scatter<T, kVec<T>>(p, st) : scatter<T, 1>(p, st);
  });
}

int launch_max_pool_gather(const MaxPoolGatherParams& p, void* stream) {
  if (no_pixels(p) || p.maps == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  const int error = with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return wide<T>(p) && aligned16(p.s_bar, p.winners, p.a, p.g_bar) ? gather<T, kVec<T>>(p, st) : gather<T, 1>(p, st);
  });
  if (error || (!p.a_bar && !p.skip_bar)) return error;
  PhiScaleBackwardParams phi{};  // what the ReLU gives its other operands: the adjoint of phi_scale there
  phi.dtype = p.dtype;
  phi.shape = {p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.in_h * p.windows.in_w};
  phi.eps = p.eps; phi.eps_n = p.eps_n;
  phi.s_bar = p.s_bar; phi.s = p.s; phi.a = p.a;
  phi.g_bar = p.skip_bar; phi.a_bar = p.a_bar;
  return launch_phi_scale_backward(phi, stream);
}

FISNET_LAUNCHER(max_pool, launch_max_pool);
FISNET_LAUNCHER(max_pool_scatter, launch_max_pool_scatter);
FISNET_LAUNCHER(max_pool_gather, launch_max_pool_gather);
FISNET_KERNEL(max_pool_kernel<float, 4>);
FISNET_KERNEL(max_pool_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(max_pool_scatter_kernel<float, 4>);
FISNET_KERNEL(max_pool_scatter_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(max_pool_gather_kernel<float, 4>);
FISNET_KERNEL(max_pool_gather_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
