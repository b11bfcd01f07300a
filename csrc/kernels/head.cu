#include "head.h"

#include <cmath>

#include "../device/maps.cuh"
#include "../device/phi.cuh"

namespace fisnet {
namespace {
// ---- eta ---------------------------------------------------------------------------------------------------------------
constexpr int kRowThreads = 256;  // one block a sample

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

struct Add {
  template <typename A> __device__ __forceinline__ A operator()(A x, A y) const { return x + y; }
};
struct Larger {  // a NaN stays
  template <typename A> __device__ __forceinline__ A operator()(A x, A y) const { return x > y || x != x ? x : y; }
};
// `mine` of all threads combined, as a tree, so always in the same order; every thread must call it and gets the result.
template <typename A, typename Op>
__device__ __forceinline__ A over_block(A mine, Op op, A* shared) {
  const int tid = static_cast<int>(threadIdx.x);
  shared[tid] = mine;
  __syncthreads();
  for (int half = kRowThreads / 2; half; half /= 2) {
    if (tid < half) shared[tid] = op(shared[tid], shared[tid + half]);
    __syncthreads();
  }
  const A all = shared[0];
  __syncthreads();  // shared may be used again
  return all;
}

// The softmax of one sample's logits, by value: P(j) = exp(logits_j - top) / sum.
template <typename T> struct Softmax {
  const T* logits;
  Acc<T> top, sum;

  __device__ __forceinline__ Softmax(const T* from, int classes, Acc<T>* shared) : logits(from) {
    using A = Acc<T>;
    A mine = static_cast<A>(-INFINITY);
    for (int j = static_cast<int>(threadIdx.x); j < classes; j += kRowThreads) mine = Larger{}(mine, to_acc(from[j]));
    top = over_block(mine, Larger{}, shared);
    mine = 0;
    for (int j = static_cast<int>(threadIdx.x); j < classes; j += kRowThreads) mine += exp_of(to_acc(from[j]) - top);
    sum = over_block(mine, Add{}, shared);
  }
  __device__ __forceinline__ Acc<T> operator()(int j) const { return exp_of(to_acc(logits[j]) - top) / sum; }
};

// P_c / (P_c + t) + P_c / (1 - P_c + t) = d eta / d P_c . P_c, and its derivative.
template <typename A> __device__ __forceinline__ A slope_of(A p, A t) { return (1 / (p + t) + 1 / (1 - p + t)) * p; }
template <typename A> __device__ __forceinline__ A slope_derivative(A p, A t) {
  const A up = p + t, down = 1 - p + t;
  return t / (up * up) + (1 + t) / (down * down);
}
// The class of map k; a class that does not exist gives NaN (an explained class is checked in Python, where values may be seen).
__device__ __forceinline__ int class_of(const int64_t* index, int k, int classes) {
  const int64_t c = index[k];
  return c >= 0 && c < classes ? static_cast<int>(c) : -1;
}

// start[k, j] = slope(P_c) (delta_jc - P_j), c = index[k]: the gradient of eta = log(P_c + t) - log(1 - P_c + t), P = softmax.
// A block owns one sample at a time; its threads stride over the classes. Shared memory: one value a thread, for two sums.
// Accumulates in float32 (float64 for float64). Deterministic.
// no 16-byte loads and stores: rows of logits have any length, so their starts have any alignment
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) eta_start_kernel(EtaStartParams p) {
  using A = Acc<T>;
  FISNET_SHARED(A, shared, kRowThreads);
  const A t = static_cast<A>(p.eta_eps);
  for (int64_t n = blockIdx.x; n < p.samples; n += gridDim.x) {
    const Softmax<T> P(static_cast<const T*>(p.logits) + n * p.classes, p.classes, shared);
    for (int k = 0; k < p.maps; ++k) {
      const int c = class_of(static_cast<const int64_t*>(p.index) + n * p.maps, k, p.classes);
      const A slope = c < 0 ? static_cast<A>(NAN) : slope_of(P(c), t);
      A* const to = static_cast<A*>(p.start) + (n * p.maps + k) * p.classes;
      for (int j = static_cast<int>(threadIdx.x); j < p.classes; j += kRowThreads) to[j] = slope * ((j == c ? A(1) : A(0)) - P(j));
    }
  }
}

// The adjoint, with D_k = sum_j start_bar[k, j] P_j and w_k = slope'(P_c) (start_bar[k, c] - D_k):
//   P_bar_j = sum_k (delta_jc w_k - slope_k start_bar[k, j]),   logits_bar_j = P_j (P_bar_j - sum_i P_bar_i P_i).
// Blocks and threads as above; each thread adds up the P_bar of its own classes over the maps, in order. Deterministic.
// no 16-byte loads and stores: rows of logits have any length, so their starts have any alignment
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 4) eta_start_backward_kernel(EtaStartBackwardParams p) {
  using A = Acc<T>;
  FISNET_SHARED(A, shared, kRowThreads);
  const A t = static_cast<A>(p.eta_eps);
  const int tid = static_cast<int>(threadIdx.x);
  for (int64_t n = blockIdx.x; n < p.samples; n += gridDim.x) {
    const Softmax<T> P(static_cast<const T*>(p.logits) + n * p.classes, p.classes, shared);
    A* const P_bar = static_cast<A*>(p.P_bar) + n * p.classes;
    A total = 0;  // sum_i P_bar_i P_i
    for (int k = 0; k < p.maps; ++k) {
      const A* const bar = static_cast<const A*>(p.start_bar) + (n * p.maps + k) * p.classes;
      const int c = class_of(static_cast<const int64_t*>(p.index) + n * p.maps, k, p.classes);
      A mine = 0;
      for (int j = tid; j < p.classes; j += kRowThreads) mine += bar[j] * P(j);
      const A D = over_block(mine, Add{}, shared);
      const A P_c = c < 0 ? static_cast<A>(NAN) : P(c);
      const A slope = slope_of(P_c, t), w = slope_derivative(P_c, t) * ((c < 0 ? A(0) : bar[c]) - D);
      for (int j = tid; j < p.classes; j += kRowThreads) P_bar[j] = (k ? P_bar[j] : A(0)) + (j == c ? w : A(0)) - slope * bar[j];
      total += w * P_c - slope * D;
    }
    T* const to = static_cast<T*>(p.logits_bar) + n * p.classes;
    for (int j = tid; j < p.classes; j += kRowThreads) to[j] = from_acc<T>(P(j) * ((p.maps ? P_bar[j] : A(0)) - total));
  }
}

// ---- z+ start ----------------------------------------------------------------------------------------------------------
template <typename T, int W>
__device__ __forceinline__ void plus_start_at(const PlusStartParams& p, int64_t at) {
  using A = Acc<T>;
  const A e = static_cast<A>(p.eps);
  const T* const bias = static_cast<const T*>(p.bias);
  A z[W], bar[W];
  load<T, W>(z, static_cast<const T*>(p.P) + at);
  if (p.s_bar) load<T, W>(bar, static_cast<const T*>(p.s_bar) + at);
  uint32_t c = static_cast<uint32_t>(at % p.classes);
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    if (bias) {
      const A b = to_acc(bias[c]);
      z[i] += b < A(0) ? A(0) : b;
    }
    A den = z[i] + e;
    if (den == A(0)) den = 1;  // 0 / 0 is 0
    z[i] = p.s_bar ? bar[i] / den * (e / den) : z[i] / den;
    if (++c == static_cast<uint32_t>(p.classes)) c = 0;
  }
  store<T, W>(static_cast<T*>(p.out) + at, z);
}

// s+ = z+ / (z+ + e), z+ = P + max(b, 0); or its adjoint, P_bar = e s_bar / (z+ + e)^2 (the bias is a constant of the rule).
// A thread owns W elements. No shared memory. Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(kMapThreads, 4) plus_start_kernel(PlusStartParams p) {
  each_vector<W>(p.rows * p.classes, [&](int64_t at, auto width) { plus_start_at<T, decltype(width)::value>(p, at); });
}

// ---- global average pool, transposed, and the ReLU before it -----------------------------------------------------------------
// W values of one a channel, beside the elements from `at` of one sample; an absent tensor reads 0.
template <typename T, int W, bool kLast>
__device__ __forceinline__ Raw<T, W> of_channels(const T* from, int at, int channels, int pixels) {
  if constexpr (kLast) {
    return fetch<W>(from, static_cast<uint32_t>(at) % static_cast<uint32_t>(channels));
  } else {
    Raw<T, W> v;
    if (!from) return v;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) v.set(i, to_acc(from[static_cast<uint32_t>(at + i) / static_cast<uint32_t>(pixels)]));
    return v;
  }
}

template <typename T, int W, bool kLast>
__device__ __forceinline__ void pooled_phi_at(const PooledPhiParams& p, int64_t size, int at) {
  using A = Acc<T>;
  const A share = A(1) / static_cast<A>(p.pixels);
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    const auto g_of = [&](const void* from, int64_t row) {
      return of_channels<T, W, kLast>(from ? static_cast<const T*>(from) + row * p.channels : nullptr, at, p.channels, p.pixels);
    };
    const Raw<T, W> a = fetch<W>(static_cast<const T*>(p.a), n * size + at), z_plus = fetch<W>(static_cast<const T*>(p.z_plus), n * size + at);
    const Raw<T, W> g_plus = g_of(p.g_plus, n);
    Raw<T, W> g = g_of(p.g, n * p.maps), s;
    if (p.z_plus) {
      const A e = static_cast<A>(p.eps_plus);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) s.set(i, Divisor<A>(denominator(z_plus[i], e))(a[i] * (g_plus[i] * share)));
      put(static_cast<T*>(p.s_plus), n * size + at, s);
    }
    const A e = eps_of<T>(p.eps, p.eps_n, n);
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) s.set(i, phi(gated(a[i], e), e) * (g[i] * share));
      if (k + 1 < p.maps) g = g_of(p.g, map + 1);
      put(static_cast<T*>(p.s), map * size + at, s);
    }
  }
}

// s = a / (a + e) . g / (H W), the same g for all pixels; with z_plus also s+ = a (g+ / (H W)) / (z+ + e).
// A thread owns W elements of every gridDim.y-th sample, and all K maps. No shared memory. Deterministic.
template <typename T, int W, bool kLast>
__global__ void __launch_bounds__(kMapThreads, sizeof(T) == 8 ? 2 : 4) pooled_phi_kernel(PooledPhiParams p) {
  const int64_t size = static_cast<int64_t>(p.channels) * p.pixels;
  each_vector<W>(size, [&](int64_t at, auto width) { pooled_phi_at<T, decltype(width)::value, kLast>(p, size, static_cast<int>(at)); });
}

// What W elements at `at` of sample n and map k add: u = s_bar / (a + e), g_sum += a u, a_bar += e (g / (H W)) / (a + e) u; and
// v = s+_bar / (z+ + e), g+_sum += a v, z+_bar = -a (g+ / (H W)) / (z+ + e) v, a_bar += g+ / (H W) v. A dead unit passes nothing.
template <typename T, int W>
__device__ __forceinline__ void pooled_phi_adjoint(const PooledPhiBackwardParams& p, int64_t n, int64_t map, int64_t size, int at, const Acc<T> (&q)[W],
                                                   const Acc<T> (&q_plus)[W], Acc<T> (&a_bar)[W], Acc<T> (&g_sum)[W], Acc<T> (&g_plus_sum)[W]) {
  using A = Acc<T>;
  const Raw<T, W> a = fetch<W>(static_cast<const T*>(p.a), n * size + at), s_bar = fetch<W>(static_cast<const T*>(p.s_bar), map * size + at);
  const Raw<T, W> z_plus = fetch<W>(static_cast<const T*>(p.z_plus), n * size + at);
  const Raw<T, W> s_plus_bar = fetch<W>(p.z_plus ? static_cast<const T*>(p.s_plus_bar) : nullptr, n * size + at);
  const A e = eps_of<T>(p.eps, p.eps_n, n);
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    const Divisor<A> over(denominator(a[i], e));
    const A u = a[i] == A(0) ? A(0) : over(s_bar[i]);
    g_sum[i] += a[i] * u;
    a_bar[i] += over(a[i] == A(0) ? A(0) : e) * q[i] * u;
  }
  if (!p.z_plus) return;
  Raw<T, W> z_bar;
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    const Divisor<A> over(denominator(z_plus[i], static_cast<A>(p.eps_plus)));
    const A v = over(s_plus_bar[i]);
    g_plus_sum[i] += a[i] * v;
    z_bar.set(i, -over(a[i] * q_plus[i]) * v);
    if (a[i] != A(0)) a_bar[i] += q_plus[i] * v;
  }
  put(static_cast<T*>(p.z_plus_bar), n * size + at, z_bar);
}

// q = g / (H W) of W channels (of one channel, when W = 1).
template <typename T, int W>
__device__ __forceinline__ void shares_of(Acc<T> (&q)[W], const void* g, int64_t at, int pixels) {
  load<T, W>(q, static_cast<const T*>(g) + at);
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) q[i] *= Acc<T>(1) / static_cast<Acc<T>>(pixels);
}
template <typename T, int W>
__device__ __forceinline__ void store_mean(void* to, int64_t at, Acc<T> (&sum)[W], int pixels) {
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) sum[i] *= Acc<T>(1) / static_cast<Acc<T>>(pixels);
  store<T, W>(static_cast<T*>(to) + at, sum);
}

// g_bar[c] = sum over pixels of phi(a) s_bar / (H W), and with one map a_bar (and all of Dual's), in the same pass.
// channels_last: a block owns 32 vectors of W channels of one map, its 8 rows of threads stride over the pixels; the rows are
// added through shared memory in order. Accumulates in float32 (float64 for float64). Deterministic.
constexpr int kTileX = 32, kTileY = 8;
template <typename T, int W>
__global__ void __launch_bounds__(kTileX* kTileY, 2) pooled_phi_last_backward_kernel(PooledPhiBackwardParams p) {
  using A = Acc<T>;
  FISNET_SHARED(A, part, kTileX * kTileY * W);
  const int x = static_cast<int>(threadIdx.x), y = static_cast<int>(threadIdx.y);
  const int c = (static_cast<int>(blockIdx.x) * kTileX + x) * W;
  const bool mine = c < p.channels;
  const int64_t size = static_cast<int64_t>(p.channels) * p.pixels;
  for (int64_t map = blockIdx.y; map < p.samples * p.maps; map += gridDim.y) {
    const int64_t n = map / p.maps;
    A q[W], q_plus[W] = {}, sum[2][W] = {};
    if (mine) {
      shares_of<T, W>(q, p.g, map * p.channels + c, p.pixels);
      if (p.z_plus) shares_of<T, W>(q_plus, p.g_plus, n * p.channels + c, p.pixels);
      for (int pixel = y; pixel < p.pixels; pixel += kTileY) {
        A a_bar[W] = {};
        const int at = pixel * p.channels + c;
        pooled_phi_adjoint<T, W>(p, n, map, size, at, q, q_plus, a_bar, sum[0], sum[1]);
        if (p.a_bar && p.maps == 1) store<T, W>(static_cast<T*>(p.a_bar) + n * size + at, a_bar);
      }
    }
    for (int which = 0; which < (p.z_plus ? 2 : 1); ++which) {
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) part[(y * kTileX + x) * W + i] = which ? sum[1][i] : sum[0][i];
      __syncthreads();
      if (y == 0 && mine) {
        A total[W] = {};
        for (int row = 0; row < kTileY; ++row) {
          FISNET_UNROLL
          for (int i = 0; i < W; ++i) total[i] += part[(row * kTileX + x) * W + i];
        }
        store_mean<T, W>(which ? p.g_plus_bar : p.g_bar, map * p.channels + c, total, p.pixels);
      }
      __syncthreads();
    }
  }
}

// The same for contiguous tensors: a warp owns one channel of one map, its lanes stride over the pixels and add as a tree.
// no 16-byte loads and stores: contiguous planes of a global pool (7x7, 49 values) have any alignment
template <typename T>
__global__ void __launch_bounds__(kTileX* kTileY, 2) pooled_phi_backward_kernel(PooledPhiBackwardParams p) {
  using A = Acc<T>;
  const int c = static_cast<int>(blockIdx.x) * kTileY + static_cast<int>(threadIdx.y);
  if (c >= p.channels) return;  // a whole warp
  const int64_t size = static_cast<int64_t>(p.channels) * p.pixels;
  for (int64_t map = blockIdx.y; map < p.samples * p.maps; map += gridDim.y) {
    const int64_t n = map / p.maps;
    A q[1], q_plus[1] = {}, sum[2][1] = {};
    shares_of<T, 1>(q, p.g, map * p.channels + c, p.pixels);
    if (p.z_plus) shares_of<T, 1>(q_plus, p.g_plus, n * p.channels + c, p.pixels);
    for (int pixel = static_cast<int>(threadIdx.x); pixel < p.pixels; pixel += kTileX) {
      A a_bar[1] = {};
      const int at = c * p.pixels + pixel;
      pooled_phi_adjoint<T, 1>(p, n, map, size, at, q, q_plus, a_bar, sum[0], sum[1]);
      if (p.a_bar && p.maps == 1) store<T, 1>(static_cast<T*>(p.a_bar) + n * size + at, a_bar);
    }
    for (int half = kTileX / 2; half; half /= 2) {
      sum[0][0] += __shfl_xor_sync(0xffffffffu, sum[0][0], half);
      sum[1][0] += __shfl_xor_sync(0xffffffffu, sum[1][0], half);
    }
    if (threadIdx.x) continue;
    store_mean<T, 1>(p.g_bar, map * p.channels + c, sum[0], p.pixels);
    if (p.z_plus) store_mean<T, 1>(p.g_plus_bar, map * p.channels + c, sum[1], p.pixels);
  }
}

template <typename T, int W, bool kLast>
__device__ __forceinline__ void pooled_phi_a_bar_at(const PooledPhiBackwardParams& p, int64_t size, int at) {
  using A = Acc<T>;
  for (int64_t n = blockIdx.y; n < p.samples; n += gridDim.y) {
    A a_bar[W] = {}, unused[W] = {};
    for (int k = 0; k < p.maps; ++k) {
      const int64_t map = n * p.maps + k;
      const Raw<T, W> g = of_channels<T, W, kLast>(static_cast<const T*>(p.g) + map * p.channels, at, p.channels, p.pixels);
      A q[W];
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) q[i] = g[i] * (A(1) / static_cast<A>(p.pixels));
      pooled_phi_adjoint<T, W>(p, n, map, size, at, q, q, a_bar, unused, unused);
    }
    store<T, W>(static_cast<T*>(p.a_bar) + n * size + at, a_bar);
  }
}

// a_bar = sum_k e (g / (H W)) / (a + e) . s_bar / (a + e), for more maps than one (not with z_plus).
// A thread owns W elements of every gridDim.y-th sample. No shared memory. Deterministic.
template <typename T, int W, bool kLast>
__global__ void __launch_bounds__(kMapThreads, 3) pooled_phi_a_bar_kernel(PooledPhiBackwardParams p) {
  const int64_t size = static_cast<int64_t>(p.channels) * p.pixels;
  each_vector<W>(size, [&](int64_t at, auto width) { pooled_phi_a_bar_at<T, decltype(width)::value, kLast>(p, size, static_cast<int>(at)); });
}

template <typename P> Maps maps_of(const P& p) { return {p.samples, p.maps, static_cast<int64_t>(p.channels) * p.pixels}; }
// Vectors of channels in channels_last; in contiguous tensors, of neighbouring pixels (and across channels).
template <typename T, typename P> bool vectors(const P& p) { return p.channels_last ? p.channels % kVec<T> == 0 : maps_of(p).vectors(kVec<T>); }

template <typename T, int W, bool kLast>
int forward(const PooledPhiParams& p, cudaStream_t stream) {
  return static_cast<int>(launch(pooled_phi_kernel<T, W, kLast>, map_grid(maps_of(p), W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W, bool kLast>
int a_bar_of_maps(const PooledPhiBackwardParams& p, cudaStream_t stream) {
  return static_cast<int>(launch(pooled_phi_a_bar_kernel<T, W, kLast>, map_grid(maps_of(p), W), dim3(kMapThreads), 0, stream, p));
}
template <typename T, int W>
int backward(const PooledPhiBackwardParams& p, cudaStream_t stream) {
  const unsigned rows = static_cast<unsigned>(std::min<int64_t>(p.samples * p.maps, 65535));
  const dim3 block(kTileX, kTileY);
  if (p.channels_last) {
    const dim3 grid(static_cast<unsigned>(ceil_div(p.channels, kTileX * W)), rows);
    return static_cast<int>(launch(pooled_phi_last_backward_kernel<T, W>, grid, block, 0, stream, p));
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(p.channels, kTileY)), rows);
  return static_cast<int>(launch(pooled_phi_backward_kernel<T>, grid, block, 0, stream, p));
}
}  // namespace

int launch_eta_start(const EtaStartParams& p, void* stream) {
  if (p.samples == 0 || p.maps == 0 || p.classes == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.samples, 65535)));
    return static_cast<int>(launch(eta_start_kernel<T>, grid, dim3(kRowThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

int launch_eta_start_backward(const EtaStartBackwardParams& p, void* stream) {
  if (p.samples == 0 || p.classes == 0) return 0;
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const dim3 grid(static_cast<unsigned>(std::min<int64_t>(p.samples, 65535)));
    return static_cast<int>(launch(eta_start_backward_kernel<T>, grid, dim3(kRowThreads), 0, static_cast<cudaStream_t>(stream), p));
  });
}

int launch_plus_start(const PlusStartParams& p, void* stream) {
  if (p.rows * p.classes == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = kVec<T>;
    const Maps flat{1, 1, p.rows * p.classes};
    if (aligned16(p.P, p.s_bar, p.out)) return static_cast<int>(launch(plus_start_kernel<T, W>, map_grid(flat, W), dim3(kMapThreads), 0, st, p));
    return static_cast<int>(launch(plus_start_kernel<T, 1>, map_grid(flat, 1), dim3(kMapThreads), 0, st, p));
  });
}

int launch_pooled_phi(const PooledPhiParams& p, void* stream) {
  if (p.samples * p.maps * p.channels * p.pixels == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = kVec<T>;
    const bool wide = vectors<T>(p) && aligned16(p.g, p.g_plus, p.a, p.z_plus, p.s, p.s_plus);
    if (p.channels_last) return wide ? forward<T, W, true>(p, st) : forward<T, 1, true>(p, st);
    return wide ? forward<T, W, false>(p, st) : forward<T, 1, false>(p, st);
  });
}

int launch_pooled_phi_backward(const PooledPhiBackwardParams& p, void* stream) {
  if (p.samples * p.maps * p.channels * p.pixels == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int W = kVec<T>;
    const bool wide = vectors<T>(p) && aligned16(p.s_bar, p.s_plus_bar, p.g, p.g_plus, p.a, p.z_plus, p.g_bar, p.g_plus_bar, p.a_bar, p.z_plus_bar);
    const int error = wide && p.channels_last ? backward<T, W>(p, st) : backward<T, 1>(p, st);
    if (error || !p.a_bar || p.maps == 1) return error;
    if (p.channels_last) return wide ? a_bar_of_maps<T, W, true>(p, st) : a_bar_of_maps<T, 1, true>(p, st);
    return wide ? a_bar_of_maps<T, W, false>(p, st) : a_bar_of_maps<T, 1, false>(p, st);
  });
}

FISNET_LAUNCHER(eta_start, launch_eta_start);
FISNET_LAUNCHER(eta_start_backward, launch_eta_start_backward);
FISNET_LAUNCHER(plus_start, launch_plus_start);
FISNET_LAUNCHER(pooled_phi, launch_pooled_phi);
FISNET_LAUNCHER(pooled_phi_backward, launch_pooled_phi_backward);
FISNET_KERNEL(eta_start_kernel<float>);
FISNET_KERNEL(eta_start_backward_kernel<float>);
FISNET_KERNEL(plus_start_kernel<float, 4>);
FISNET_KERNEL(plus_start_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(pooled_phi_kernel<float, 4, true>);
FISNET_KERNEL(pooled_phi_kernel<__nv_bfloat16, 8, true>);
FISNET_KERNEL(pooled_phi_last_backward_kernel<float, 4>);
FISNET_KERNEL(pooled_phi_last_backward_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(pooled_phi_a_bar_kernel<float, 4, true>);
FISNET_KERNEL(pooled_phi_a_bar_kernel<__nv_bfloat16, 8, true>);
}  // namespace fisnet
