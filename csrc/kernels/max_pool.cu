#include "max_pool.h"

#include <cmath>

#include "../device/maps.cuh"

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

// W winners by one access of W bytes.
template <int W> struct alignas(W) Bytes { uint8_t part[W]; };

template <typename T, int W> __device__ __forceinline__ void phi_of(Acc<T> (&phi)[W], const T* __restrict__ a, Acc<T> e) {
  load<T, W>(phi, a);
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) phi[i] = phi[i] == Acc<T>(0) ? Acc<T>(0) : phi[i] / (phi[i] + e);  // 0 / 0 is 0
}
template <typename T, typename P> __device__ __forceinline__ Acc<T> eps_of(const P& p, int64_t n) {
  return p.eps_n ? to_acc(static_cast<const T*>(p.eps_n)[n]) : static_cast<Acc<T>>(p.eps);
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
    Bytes<W> winner;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      best[i] = static_cast<A>(-INFINITY);
      winner.part[i] = static_cast<uint8_t>(rows.first * v.kernel_w + columns.first);
    }
    for (int kh = rows.first; kh < rows.last; ++kh) {
      const int row = (h0 + kh * v.dilation_h) * v.in_w;
      for (int kw = columns.first; kw < columns.last; ++kw) {
        A value[W];
        load<T, W>(value, x + (row + w0 + kw * v.dilation_w) * step);
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) {
          if (value[i] > best[i] || value[i] != value[i]) {
            best[i] = value[i];
            winner.part[i] = static_cast<uint8_t>(kh * v.kernel_w + kw);
          }
        }
      }
    }
    store<T, W>(static_cast<T*>(p.y) + n * out_size + at, best);
    *reinterpret_cast<Bytes<W>*>(static_cast<uint8_t*>(p.winners) + n * out_size + at) = winner;
  }
}

// The transpose, as a gather: out[pixel] = sum of g over the windows whose winner the pixel is; with a,
// s = a / (a + e) . (that + skip), LRP-epsilon at the ReLU before the pool.
// A thread owns W channels of one input pixel (W = 1 in contiguous tensors) of every gridDim.y-th sample, and all K maps. It
// visits the windows that cover the pixel in order of rows and columns: no atomics, deterministic. Accumulates in float32
// (float64 for float64). No shared memory: the windows' g and winners are read again by neighbouring pixels, from the caches.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) max_pool_scatter_kernel(MaxPoolScatterParams p) {
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
    A phi[W];
    if (p.a) phi_of<T, W>(phi, static_cast<const T*>(p.a) + n * in_size + at, eps_of<T>(p, n));
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      const T* const g = static_cast<const T*>(p.g) + map * out_size + base;
      A sum[W] = {};
      for (int oh = rows.first; oh < rows.last; ++oh) {
        int kh = top - oh * v.stride_h;
        if (v.dilation_h > 1) {
          if (kh % v.dilation_h) continue;
          kh /= v.dilation_h;
        }
        for (int ow = columns.first; ow < columns.last; ++ow) {
          int kw = left - ow * v.stride_w;
          if (v.dilation_w > 1) {
            if (kw % v.dilation_w) continue;
            kw /= v.dilation_w;
          }
          const int window = (oh * v.out_w + ow) * step;
          const uint8_t mine = static_cast<uint8_t>(kh * v.kernel_w + kw);
          const Bytes<W> winner = *reinterpret_cast<const Bytes<W>*>(winners + window);
          A share[W];
          load<T, W>(share, g + window);
          FISNET_UNROLL
          for (int i = 0; i < W; ++i) sum[i] += winner.part[i] == mine ? share[i] : A(0);
        }
      }
      if (p.a) {
        if (p.skip) {
          A more[W];
          load<T, W>(more, static_cast<const T*>(p.skip) + map * in_size + at);
          FISNET_UNROLL
          for (int i = 0; i < W; ++i) sum[i] += more[i];
        }
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) sum[i] *= phi[i];
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
__global__ void __launch_bounds__(kMapThreads, 3) max_pool_gather_kernel(MaxPoolGatherParams p) {
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
    const Bytes<W> winner = *reinterpret_cast<const Bytes<W>*>(static_cast<const uint8_t*>(p.winners) + n * out_size + at);
    const T* const a = p.a ? static_cast<const T*>(p.a) + n * in_size + base : nullptr;
    const A e = p.a ? eps_of<T>(p, n) : A(0);
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      const T* const s_bar = static_cast<const T*>(p.s_bar) + map * in_size + base;
      A found[W] = {}, phi[W];
      if constexpr (W == 1) {
        const int kh = winner.part[0] / v.kernel_w, kw = winner.part[0] - kh * v.kernel_w;
        if (kh >= rows.first && kh < rows.last && kw >= columns.first && kw < columns.last) {
          const int pixel = ((h0 + kh * v.dilation_h) * v.in_w + w0 + kw * v.dilation_w) * step;
          load<T, W>(found, s_bar + pixel);
          if (a) {
            phi_of<T, W>(phi, a + pixel, e);
            found[0] *= phi[0];
          }
        }
      } else {
        for (int kh = rows.first; kh < rows.last; ++kh) {
          const int row = (h0 + kh * v.dilation_h) * v.in_w;
          for (int kw = columns.first; kw < columns.last; ++kw) {
            const int pixel = (row + w0 + kw * v.dilation_w) * step;
            A value[W];
            load<T, W>(value, s_bar + pixel);
            if (a) load<T, W>(phi, a + pixel);
            FISNET_UNROLL
            for (int i = 0; i < W; ++i) {
              if (winner.part[i] != kh * v.kernel_w + kw) continue;
              found[i] = !a ? value[i] : phi[i] == A(0) ? A(0) : phi[i] / (phi[i] + e) * value[i];
            }
          }
        }
      }
      store<T, W>(static_cast<T*>(p.g_bar) + map * out_size + at, found);
    }
  }
}

template <typename T, int W>
__device__ __forceinline__ void phi_adjoint_at(const MaxPoolGatherParams& p, int64_t size, int64_t at) {
  using A = Acc<T>;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    A a[W], a_bar[W] = {};
    load<T, W>(a, static_cast<const T*>(p.a) + n * size + at);
    const A e = eps_of<T>(p, n);
    for (int k = 0; k < p.maps; ++k) {
      const int64_t j = (n * p.maps + k) * size + at;
      A u[W], s[W];
      load<T, W>(u, static_cast<const T*>(p.s_bar) + j);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) u[i] = a[i] == A(0) ? A(0) : u[i] / (a[i] + e);  // a dead unit passes nothing
      if (p.a_bar) {
        load<T, W>(s, static_cast<const T*>(p.s) + j);
        FISNET_UNROLL
        for (int i = 0; i < W; ++i) a_bar[i] += a[i] == A(0) ? A(0) : e * (s[i] / a[i]) * u[i];
      }
      if (!p.skip_bar) continue;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) u[i] *= a[i];
      store<T, W>(static_cast<T*>(p.skip_bar) + j, u);
    }
    if (p.a_bar) store<T, W>(static_cast<T*>(p.a_bar) + n * size + at, a_bar);
  }
}

// What the fused transpose gives its other operands: a_bar = sum_k e (s / a) (s_bar / (a + e)), the ratios first, so that
// products of small numbers do not underflow; skip_bar = a / (a + e) . s_bar.
// A thread owns W elements of every gridDim.y-th sample's input, and all K maps. No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) max_pool_phi_adjoint_kernel(MaxPoolGatherParams p) {
  const int64_t size = static_cast<int64_t>(p.channels) * p.windows.in_h * p.windows.in_w;
  each_vector<W>(size, [&](int64_t at, auto width) { phi_adjoint_at<T, decltype(width)::value>(p, size, at); });
}

// Vectors of W run over channels: only in channels_last, and where all start on 16 bytes.
template <typename T, typename P> bool wide(const P& p) { return p.channels_last && p.channels % kVec<T> == 0; }

template <typename T, int W>
int forward(const MaxPoolParams& p, cudaStream_t stream) {
  const Maps out{p.samples, 1, static_cast<int64_t>(p.channels) * p.windows.out_h * p.windows.out_w};
  return static_cast<int>(launch(max_pool_kernel<T, W>, map_grid(out, W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int scatter(const MaxPoolScatterParams& p, cudaStream_t stream) {
  const Maps in{p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.in_h * p.windows.in_w};
  return static_cast<int>(launch(max_pool_scatter_kernel<T, W>, map_grid(in, W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int gather(const MaxPoolGatherParams& p, cudaStream_t stream) {
  const Maps out{p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.out_h * p.windows.out_w};
  return static_cast<int>(launch(max_pool_gather_kernel<T, W>, map_grid(out, W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int phi_adjoint(const MaxPoolGatherParams& p, const Maps& in, cudaStream_t stream) {
  return static_cast<int>(launch(max_pool_phi_adjoint_kernel<T, W>, map_grid(in, W), dim3(kMapThreads), 0, stream, p));
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
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const int error = wide<T>(p) && aligned16(p.s_bar, p.winners, p.a, p.g_bar) ? gather<T, kVec<T>>(p, st) : gather<T, 1>(p, st);
    if (error || (!p.a_bar && !p.skip_bar)) return error;
    const Maps in{p.samples, p.maps, static_cast<int64_t>(p.channels) * p.windows.in_h * p.windows.in_w};
    const bool vectors = in.vectors(kVec<T>) && aligned16(p.s_bar, p.s, p.a, p.a_bar, p.skip_bar);
    return vectors ? phi_adjoint<T, kVec<T>>(p, in, st) : phi_adjoint<T, 1>(p, in, st);
  });
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
FISNET_KERNEL(max_pool_phi_adjoint_kernel<float, 4>);
FISNET_KERNEL(max_pool_phi_adjoint_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
