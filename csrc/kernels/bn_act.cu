#include "bn_act.h"

#include "../device/channels.cuh"
#include "../device/maps.cuh"

namespace fisnet {
namespace {
constexpr int kThreads = ChannelGrid::kThreads;

// Vectors of every operand that a thread has under way together, and blocks a multiprocessor. An H100 needs some 14 KB under way
// a multiprocessor, better twice that. ChannelGrid makes 512 blocks where channels are few: one round of 4 blocks a
// multiprocessor, or two of 2. With 3, most of the second round would stay empty.
template <typename T> constexpr int kMomentsVectors = sizeof(T) == 8 ? 1 : 4;
template <typename T> constexpr int kApplyVectors = sizeof(T) == 2 ? 2 : 1;
template <typename T, int kMost> constexpr int kBackwardVectors = sizeof(T) == 8 ? 1 : (sizeof(T) == 2 ? 2 : 1) * (kMost == 1 ? 2 : 1);
template <typename T> constexpr int kSumsBlocks = sizeof(T) == 4 ? 4 : 2;
template <typename T, bool kBatchStatistics> constexpr int kGradBlocks = sizeof(T) == 8 || (sizeof(T) == 2 && kBatchStatistics) ? 2 : 4;

// each_of_channel, V vectors at a time, so that the body can have the loads of all of them under way before it uses any: calls
// f(offset, vectors) with V places in memory, and for the few that are left over with one (vectors::value is V or 1).
template <int W, int V, typename F>
__device__ __forceinline__ void each_batch_of_channel(const Planes& p, F&& f) {
  const auto sweep = [&](uint32_t at, uint32_t step, uint32_t count, auto&& place) {
    for (; at + (V - 1) * step < count; at += V * step) {
      int64_t offset[V];
      FISNET_UNROLL
      for (int v = 0; v < V; ++v) offset[v] = place(at + v * step);
      f(offset, std::integral_constant<int, V>{});
    }
    if constexpr (V > 1) {
      for (; at < count; at += step) {
        const int64_t offset[1] = {place(at)};
        f(offset, std::integral_constant<int, 1>{});
      }
    }
  };
  if (p.inner == 1) {
    const int c = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * W;
    if (c >= p.channels) return;
    sweep(blockIdx.y * blockDim.y + threadIdx.y, gridDim.y * blockDim.y, static_cast<uint32_t>(p.outer),
          [&](uint32_t row) { return static_cast<int64_t>(row) * p.channels + c; });
  } else {
    const int c = static_cast<int>(blockIdx.x);
    const uint32_t inner = static_cast<uint32_t>(p.inner);
    sweep((blockIdx.y * blockDim.x + threadIdx.x) * W, gridDim.y * blockDim.x * W, static_cast<uint32_t>(p.outer) * inner, [&](uint32_t at) {
      const uint32_t o = at / inner;
      return (static_cast<int64_t>(o) * p.channels + c) * inner + (at - o * inner);
    });
  }
}

// The first of this thread's channels, as each_of_channel has it.
template <int W>
__device__ __forceinline__ int own_channel(const Planes& p) {
  return p.inner == 1 ? static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x) * W : static_cast<int>(blockIdx.x);
}

// A per-channel vector at this thread's W elements: W channels where channels are innermost, else one for all.
template <int W, typename A>
__device__ __forceinline__ void load_channels(const Planes& p, int c, const void* from, A (&v)[W], A absent) {
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) v[i] = from && c < p.channels ? static_cast<const A*>(from)[p.inner == 1 ? c + i : c] : absent;
}

// ---- statistics ----------------------------------------------------------------------------------------------------------
// Moments of a set of values: count, mean (as an unevaluated sum of two numbers) and the sum of squares about it.
template <typename A> struct Moments {
  A n, mean, low, m2;
};

// The moments of both sets together (Chan et al. 1983). What the rounding of the mean cuts off is kept in `low`: the mean
// after many merges is as exact as the values' own, whether they lie about 0 or far from it.
template <typename A>
__device__ __forceinline__ void merge(Moments<A>& a, const Moments<A>& b) {
  if (b.n == A(0)) return;
  const A n = a.n + b.n, share = b.n / n, delta = (b.mean - a.mean) + (b.low - a.low), step = delta * share;
  const A mean = a.mean + step, back = mean - a.mean;
  a.low += (a.mean - (mean - back)) + (step - back);
  a.mean = mean;
  a.m2 = fma(delta * (a.n * share), delta, a.m2 + b.m2);
  a.n = n;
}

// A channel's first value: all moments are taken about it, so that a large offset costs no digits.
template <typename T>
__device__ __forceinline__ Acc<T> origin(const BnStatisticsParams& p, int c) {
  return to_acc(static_cast<const T*>(p.x)[static_cast<int64_t>(c) * p.planes.inner]);
}

// partial[slab] = the moments of every channel, about its first value, by Welford's algorithm.
// Blocks own channels and slabs as in device/channels.cuh; a thread W elements at a time. Shared memory holds the threads'
// moments, merged as a tree. Accumulates in float32 (float64 for float64). Deterministic.
// no 16-byte stores: a block leaves one moment a channel
template <typename T, int W>
__global__ void __launch_bounds__(kThreads, 4) bn_moments_kernel(BnStatisticsParams p) {
  using A = Acc<T>;
  const bool inside = p.planes.inner == 1;
  const int first = own_channel<W>(p.planes);
  A x0[W], mean[W] = {}, m2[W] = {}, count = 0;
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) x0[i] = first < p.planes.channels ? origin<T>(p, inside ? first + i : first) : A(0);
  each_batch_of_channel<W, kMomentsVectors<T>>(p.planes, [&](const auto& offset, auto vectors) {
    A share[vectors()];  // before the loads: a division has branches, behind which the compiler would move a load to its use
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) share[v] = A(1) / (count += A(1));
    Raw<T, W> raw[vectors()];
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) raw[v].fetch(static_cast<const T*>(p.x), offset[v]);
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) {
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        const A x = raw[v][i] - x0[i], delta = x - mean[i];
        mean[i] = fma(delta, share[v], mean[i]);
        m2[i] = fma(delta, x - mean[i], m2[i]);
      }
    }
  });

  // the tree: over threadIdx.y for W channels each, or over all threads and their W lanes for one channel
  const int tid = static_cast<int>(threadIdx.y * blockDim.x + threadIdx.x);
  const int lane = inside ? static_cast<int>(threadIdx.y) : tid, lanes = inside ? static_cast<int>(blockDim.y) : kThreads;
  const int stride = inside ? static_cast<int>(blockDim.x) : 1;
  FISNET_SHARED(A, part, kThreads / 2 * (3 * W + 1));  // the upper half of the lanes hands its moments to the lower one
  constexpr int kSlots = kThreads / 2;
  Moments<A> own[W];
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    own[i] = {count, mean[i], A(0), m2[i]};
    if (i > 0 && !inside) merge(own[0], own[i]);
  }
  for (int half = lanes / 2; half; half /= 2) {
    const int slot = tid - (lane < half ? 0 : half * stride);
    if (lane >= half && lane < 2 * half) {
      part[slot] = own[0].n;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        if (i > 0 && !inside) break;
        part[(3 * i + 1) * kSlots + slot] = own[i].mean;
        part[(3 * i + 2) * kSlots + slot] = own[i].low;
        part[(3 * i + 3) * kSlots + slot] = own[i].m2;
      }
    }
    __syncthreads();
    if (lane < half) {
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        if (i > 0 && !inside) break;
        merge(own[i], {part[slot], part[(3 * i + 1) * kSlots + slot], part[(3 * i + 2) * kSlots + slot], part[(3 * i + 3) * kSlots + slot]});
      }
    }
    __syncthreads();
  }
  if (lane != 0 || first >= p.planes.channels) return;
  A* const to = static_cast<A*>(p.partial) + static_cast<int64_t>(blockIdx.y) * 4 * p.planes.channels + first;
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    if (i > 0 && !inside) break;
    to[i] = own[i].n;
    to[p.planes.channels + i] = own[i].mean;
    to[2 * p.planes.channels + i] = own[i].low;
    to[3 * p.planes.channels + i] = own[i].m2;
  }
}

// running = (1 - momentum) running + momentum value, in whatever type the running statistics have.
template <typename R>
__device__ __forceinline__ void move_towards(void* running, int c, double momentum, double value) {
  R* const at = static_cast<R*>(running) + c;
  *at = from_acc<R>(static_cast<Acc<R>>((1.0 - momentum) * static_cast<double>(to_acc(*at)) + momentum * value));
}
__device__ __forceinline__ void move_towards(void* running, DType dtype, int c, double momentum, double value) {
  switch (dtype) {
    case DType::f32: return move_towards<float>(running, c, momentum, value);
    case DType::bf16: return move_towards<__nv_bfloat16>(running, c, momentum, value);
    case DType::f16: return move_towards<__half>(running, c, momentum, value);
    case DType::f64: return move_towards<double>(running, c, momentum, value);
  }
}

// Slabs are put together by blocks of kFinishX channels and kFinishY threads a channel: a chain of slabs in one thread would
// take longer than the pass over memory before it.
constexpr int kFinishX = 8, kFinishY = 32;

// mean, rstd = 1 / sqrt(var + eps) with var = M2 / n, and the running statistics with n / (n - 1) var. For channels outside x
// mean and rstd are known, and var = 1 / rstd^2 - eps (to the rounding of var + eps, which is what var is used in).
// A thread merges every kFinishY-th slab, a tree in shared memory the threads of a channel. In float64. Deterministic.
// no 16-byte loads and stores: a few kilobytes of partial moments, one channel a thread
template <typename T>
__global__ void __launch_bounds__(kFinishX * kFinishY) bn_finish_kernel(BnStatisticsParams p) {
  using A = Acc<T>;
  FISNET_SHARED(double, part, 3 * kFinishX * kFinishY);
  const int at = static_cast<int>(blockIdx.x) * kFinishX + static_cast<int>(threadIdx.x), c = at - p.first, channels = p.planes.channels;
  const int tid = static_cast<int>(threadIdx.y) * kFinishX + static_cast<int>(threadIdx.x);
  const bool measured = c >= 0 && c < channels;
  Moments<double> own{};
  if (measured) {
    constexpr int kAhead = 4;  // slabs that are read together
    for (int s = static_cast<int>(threadIdx.y); s < p.slabs; s += kFinishY * kAhead) {
      A of[kAhead][4] = {};  // nothing behind the last slab
      FISNET_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const A* const from = static_cast<const A*>(p.partial) + (static_cast<int64_t>(s) + u * kFinishY) * 4 * channels + c;
        FISNET_UNROLL
        for (int i = 0; i < 4; ++i)
          if (s + u * kFinishY < p.slabs) of[u][i] = from[i * channels];
      }
      FISNET_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const double mean = static_cast<double>(of[u][1]) + static_cast<double>(of[u][2]);
        merge<double>(own, {static_cast<double>(of[u][0]), mean, 0.0, static_cast<double>(of[u][3])});
      }
    }
  }
  for (int half = kFinishY / 2; half; half /= 2) {
    const int y = static_cast<int>(threadIdx.y), other = tid + half * kFinishX;
    if (y >= half && y < 2 * half) {
      part[tid] = own.n;
      part[kThreads + tid] = own.mean;
      part[2 * kThreads + tid] = own.m2;
    }
    __syncthreads();
    if (y < half) merge<double>(own, {part[other], part[kThreads + other], 0.0, part[2 * kThreads + other]});
  }
  if (threadIdx.y != 0 || at >= p.whole) return;
  double mean, var, rstd;
  if (measured) {
    mean = own.mean + static_cast<double>(origin<T>(p, c));
    var = own.m2 / own.n;
    rstd = 1.0 / sqrt(var + p.eps);
  } else {
    const int known = c < 0 ? at : at - channels;
    mean = static_cast<double>(static_cast<const A*>(p.known_mean)[known]);
    rstd = static_cast<double>(static_cast<const A*>(p.known_rstd)[known]);
    var = 1.0 / (rstd * rstd) - p.eps;
    if (var < 0.0) var = 0.0;  // a constant channel, and the rounding of rstd; NaN stays
  }
  static_cast<A*>(p.mean)[at] = static_cast<A>(mean);
  static_cast<A*>(p.rstd)[at] = static_cast<A>(rstd);
  if (!p.running_mean) return;
  const double n = static_cast<double>(p.planes.outer * p.planes.inner);
  move_towards(p.running_mean, p.running_dtype, at, p.momentum, mean);
  move_towards(p.running_var, p.running_dtype, at, p.momentum, var * (n / (n - 1.0)));
}
static_assert(kFinishX * kFinishY == kThreads, "the finishing kernels index shared memory by kThreads");

// ---- forward -------------------------------------------------------------------------------------------------------------
constexpr int kGroup = 8;  // elements a thread: one byte of the mask

// kGroup elements in accesses of W.
template <typename T, int W> struct Group {
  Raw<T, W> raw[kGroup / W];

  // Only the first `count` of them where that is fewer (and zeros behind).
  __device__ __forceinline__ void fetch(const void* from, int64_t at, int count = kGroup) {
    const T* const x = static_cast<const T*>(from);
    if (count >= kGroup) {
      FISNET_UNROLL
      for (int j = 0; j < kGroup / W; ++j) raw[j].fetch(x, at + j * W);
    } else if (x) {
      FISNET_UNROLL
      for (int i = 0; i < kGroup; ++i) set(i, i < count ? to_acc(x[at + i]) : Acc<T>(0));
    }
  }
  __device__ __forceinline__ Acc<T> operator[](int i) const { return raw[i / W][i % W]; }
  __device__ __forceinline__ void set(int i, Acc<T> value) { raw[i / W].set(i % W, value); }
};

// Stores y = [relu](z) and its byte of the mask. NaN stays NaN and alive, as in PyTorch. The mask looks at the rounded y.
template <typename T, int W>
__device__ __forceinline__ void store_group(const BnApplyParams& p, int64_t at, const Acc<T> (&z)[kGroup], int count = kGroup) {
  using A = Acc<T>;
  Group<T, W> rounded;
  unsigned bits = 0;
  FISNET_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    const A y = to_acc(from_acc<T>(z[i]));
    const bool dead = y <= A(0);
    if (!dead && i < count) bits |= 1u << i;
    rounded.set(i, p.relu && dead ? A(0) : y);
  }
  T* const to = static_cast<T*>(p.y) + at;
  if (count >= kGroup) {
    FISNET_UNROLL
    for (int j = 0; j < kGroup / W; ++j) rounded.raw[j].put(to, j * W);
  } else {
    FISNET_UNROLL
    for (int i = 0; i < kGroup; ++i)
      if (i < count) to[i] = from_acc<T>(rounded[i]);
  }
  if (p.mask) static_cast<uint8_t*>(p.mask)[at / kGroup] = static_cast<uint8_t>(bits);
}

// y = [relu]((x - mean) scale + bias [+ skip]), scale = weight rstd; mask = y > 0, a bit an element.
// (x - mean is formed first: folding mean into the bias would lose the digits of a large offset.)
// Blocks own channels and slabs as in device/channels.cuh, a thread kGroup elements at a time of channels that stay its own,
// so per-channel values are read once. In float32 (float64 for float64). No shared memory. Deterministic.
template <typename T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4) bn_apply_kernel(BnApplyParams p) {
  using A = Acc<T>;
  constexpr int W = kVec<T>;
  A mean[kGroup], scale[kGroup], bias[kGroup], weight[kGroup];
  const int first = own_channel<kGroup>(p.planes);
  load_channels<kGroup>(p.planes, first, p.mean, mean, A(0));
  load_channels<kGroup>(p.planes, first, p.rstd, scale, A(0));
  load_channels<kGroup>(p.planes, first, p.weight, weight, A(1));
  load_channels<kGroup>(p.planes, first, p.bias, bias, A(0));
  FISNET_UNROLL
  for (int i = 0; i < kGroup; ++i) scale[i] *= weight[i];
  each_batch_of_channel<kGroup, kApplyVectors<T>>(p.planes, [&](const auto& offset, auto vectors) {
    Group<T, W> x[vectors()], skip[vectors()];
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) {
      x[v].fetch(p.x, offset[v]);
      skip[v].fetch(p.skip, offset[v]);
    }
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) {
      A z[kGroup];
      FISNET_UNROLL
      for (int i = 0; i < kGroup; ++i) z[i] = fma(x[v][i] - mean[i], scale[i], bias[i]) + skip[v][i];
      store_group<T, W>(p, offset[v], z);
    }
  });
}

// The same for any sizes and alignments: a thread owns kGroup elements that follow each other in memory, of any channels.
template <typename T, int W>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4) bn_apply_flat_kernel(BnApplyParams p) {
  using A = Acc<T>;
  const int64_t numel = p.planes.outer * p.planes.channels * p.planes.inner;
  const int64_t at = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kGroup, left = numel - at;
  if (left <= 0) return;
  const int count = left < kGroup ? static_cast<int>(left) : kGroup;
  Group<T, W> x, skip;
  x.fetch(p.x, at, count);
  skip.fetch(p.skip, at, count);
  A z[kGroup];
  // 32-bit divisions where they do: a 64-bit one is a subroutine
  const bool small = numel <= 0xffffffffll;
  const int64_t plane = small ? static_cast<uint32_t>(at) / static_cast<uint32_t>(p.planes.inner) : at / p.planes.inner;
  int64_t pixel = at - plane * p.planes.inner;
  int c = static_cast<int>(small ? static_cast<uint32_t>(plane) % static_cast<uint32_t>(p.planes.channels) : plane % p.planes.channels), known = -1;
  A mean = 0, scale = 0, bias = 0;
  FISNET_UNROLL
  for (int i = 0; i < kGroup; ++i) {
    if (i < count) {
      if (c != known) {
        mean = static_cast<const A*>(p.mean)[c];
        scale = static_cast<const A*>(p.rstd)[c] * (p.weight ? static_cast<const A*>(p.weight)[c] : A(1));
        bias = p.bias ? static_cast<const A*>(p.bias)[c] : A(0);
        known = c;
      }
      z[i] = fma(x[i] - mean, scale, bias) + skip[i];
    } else {
      z[i] = 0;
    }
    if (++pixel == p.planes.inner) {
      pixel = 0;
      if (++c == p.planes.channels) c = 0;
    }
  }
  store_group<T, W>(p, at, z, count);
}

// ---- backward ------------------------------------------------------------------------------------------------------------
// What the passes read at W elements: x and the gradients, at most kMost (one needs fewer registers than several), and the mask.
template <typename T, int W, int kMost> struct Joined {
  Raw<T, W> x, g[kMost];
  unsigned alive;

  __device__ __forceinline__ void fetch(const BnBackwardParams& p, int64_t at, bool with_x) {
    alive = p.mask ? static_cast<const uint8_t*>(p.mask)[at >> 3] : 0xffu;
    if (with_x) x.fetch(static_cast<const T*>(p.x), at);
    FISNET_UNROLL
    for (int k = 0; k < kMost; ++k)
      if (k == 0 || k < p.grads) g[k].fetch(static_cast<const T*>(p.g[k]), at);
  }

  // sum = that of the gradients where the unit is alive, 0 elsewhere. Written to `joined` where that is wanted; then it is what
  // was written, so that both passes and the gradient of skip agree.
  __device__ __forceinline__ void join(const BnBackwardParams& p, int64_t at, Acc<T> (&sum)[W]) const {
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) sum[i] = g[0][i];
    FISNET_UNROLL
    for (int k = 1; k < kMost; ++k) {
      if (k >= p.grads) break;
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) sum[i] += g[k][i];
    }
    const unsigned mine = W == kGroup ? alive : alive >> (at & 7);
    FISNET_UNROLL
    for (int i = 0; i < W; ++i)
      if (!(mine >> i & 1u)) sum[i] = 0;
    if (!p.joined) return;
    Raw<T, W> rounded;
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) {
      rounded.set(i, sum[i]);
      sum[i] = rounded[i];
    }
    rounded.put(static_cast<T*>(p.joined), at);
  }
};

// First pass: partial[slab] = (sum g, sum g (x - mean)) of every channel, and `joined`.
// Blocks own channels and slabs as in device/channels.cuh, a thread W elements at a time; shared memory holds the threads'
// sums, added as a tree. Accumulates in float32 (float64 for float64). Deterministic.
template <typename T, int W, int kMost>
__global__ void __launch_bounds__(kThreads, kSumsBlocks<T>) bn_backward_sums_kernel(BnBackwardParams p) {
  using A = Acc<T>;
  A mean[W], sum[2][W] = {};
  load_channels<W>(p.planes, own_channel<W>(p.planes), p.mean, mean, A(0));
  each_batch_of_channel<W, kBackwardVectors<T, kMost>>(p.planes, [&](const auto& offset, auto vectors) {
    Joined<T, W, kMost> in[vectors()];
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) in[v].fetch(p, offset[v], true);
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) {
      A g[W];
      in[v].join(p, offset[v], g);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        sum[0][i] += g[i];
        sum[1][i] = fma(g[i], in[v].x[i] - mean[i], sum[1][i]);
      }
    }
  });
  store_channel_partials<2, W>(p.planes, sum, static_cast<A*>(p.partial));
}

// gbias = sum g; gweight = rstd sum g (x - mean); and what the second pass subtracts:
// means = (sum g / n, rstd^2 sum g (x - mean) / n). Laid out as bn_finish_kernel. In float64. Deterministic.
// no 16-byte loads and stores: a few kilobytes of partial sums, one channel a thread
template <typename T>
__global__ void __launch_bounds__(kFinishX * kFinishY) bn_backward_finish_kernel(BnBackwardParams p) {
  using A = Acc<T>;
  FISNET_SHARED(double, part, 2 * kFinishX * kFinishY);
  const int c = static_cast<int>(blockIdx.x) * kFinishX + static_cast<int>(threadIdx.x), channels = p.planes.channels;
  const int tid = static_cast<int>(threadIdx.y) * kFinishX + static_cast<int>(threadIdx.x);
  double g = 0, gx = 0;
  if (c < channels) {
    for (int s = static_cast<int>(threadIdx.y); s < p.slabs; s += kFinishY) {
      const A* const from = static_cast<const A*>(p.partial) + static_cast<int64_t>(s) * 2 * channels + c;
      g += static_cast<double>(from[0]);
      gx += static_cast<double>(from[channels]);
    }
  }
  part[tid] = g;
  part[kThreads + tid] = gx;
  for (int half = kFinishY / 2; half; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.y) >= half) continue;
    const int other = tid + half * kFinishX;
    g += part[other];
    gx += part[kThreads + other];
    part[tid] = g;
    part[kThreads + tid] = gx;
  }
  if (threadIdx.y != 0 || c >= channels) return;
  const double n = static_cast<double>(p.planes.outer * p.planes.inner), rstd = static_cast<double>(static_cast<const A*>(p.rstd)[c]);
  static_cast<A*>(p.gbias)[c] = static_cast<A>(g);
  static_cast<A*>(p.gweight)[c] = static_cast<A>(gx * rstd);
  static_cast<A*>(p.means)[c] = static_cast<A>(g / n);
  static_cast<A*>(p.means)[channels + c] = static_cast<A>(gx * rstd * rstd / n);
}

// Second pass: gx = scale (g - m1 - (x - mean) m2), scale = weight rstd, (m1, m2) = means; gx = scale g where the statistics
// are constants. Blocks own channels and slabs, a thread W elements at a time. In float32 (float64 for float64). No shared
// memory. Deterministic. gx may lie on g[0]: a thread reads an element before it writes it. kMost as in Joined.
template <typename T, int W, bool kBatchStatistics, int kMost>
__global__ void __launch_bounds__(kThreads, kGradBlocks<T, kBatchStatistics>) bn_backward_x_kernel(BnBackwardParams p) {
  using A = Acc<T>;
  A scale[W], weight[W], mean[W], m1[W], m2[W];
  const int first = own_channel<W>(p.planes);
  load_channels<W>(p.planes, first, p.rstd, scale, A(0));
  load_channels<W>(p.planes, first, p.weight, weight, A(1));
  if constexpr (kBatchStatistics) {
    load_channels<W>(p.planes, first, p.mean, mean, A(0));
    load_channels<W>(p.planes, first, p.means, m1, A(0));
    load_channels<W>(p.planes, first, static_cast<const A*>(p.means) + p.planes.channels, m2, A(0));
  }
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) scale[i] *= weight[i];
  each_batch_of_channel<W, kMost == 1 ? kBackwardVectors<T, 1> : 1>(p.planes, [&](const auto& offset, auto vectors) {
    Joined<T, W, kMost> in[vectors()];
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) in[v].fetch(p, offset[v], kBatchStatistics);
    FISNET_UNROLL
    for (int v = 0; v < vectors(); ++v) {
      A g[W];
      Raw<T, W> out;
      in[v].join(p, offset[v], g);
      FISNET_UNROLL
      for (int i = 0; i < W; ++i) {
        if constexpr (kBatchStatistics) g[i] = fma(mean[i] - in[v].x[i], m2[i], g[i] - m1[i]);
        out.set(i, g[i] * scale[i]);
      }
      out.put(static_cast<T*>(p.gx), offset[v]);
    }
  });
}

// ---- launches ------------------------------------------------------------------------------------------------------------
struct ChannelLaunch {
  dim3 grid, block;
  ChannelLaunch(const Planes& p, int width, int slabs) {
    const ChannelGrid g = ChannelGrid::of(p, width);
    grid = dim3(static_cast<unsigned>(g.tiles), static_cast<unsigned>(slabs ? slabs : g.slabs));
    block = dim3(static_cast<unsigned>(g.x), static_cast<unsigned>(g.y));
  }
};
const dim3 kFinishBlock(kFinishX, kFinishY);
dim3 finish_grid(int channels) { return dim3(static_cast<unsigned>(ceil_div(channels, kFinishX))); }

template <typename T, int W>
int statistics(const BnStatisticsParams& p, cudaStream_t stream) {
  const ChannelLaunch over(p.planes, W, p.slabs);
  const int error = static_cast<int>(launch(bn_moments_kernel<T, W>, over.grid, over.block, 0, stream, p));
  return error ? error : static_cast<int>(launch(bn_finish_kernel<T>, finish_grid(p.whole), kFinishBlock, 0, stream, p));
}

template <typename T, int W>
int apply_flat(const BnApplyParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.planes.numel(), kThreads * kGroup)));
  return static_cast<int>(launch(bn_apply_flat_kernel<T, W>, grid, dim3(kThreads), 0, stream, p));
}

template <typename T, int W>
int backward(BnBackwardParams p, cudaStream_t stream) {
  const ChannelLaunch over(p.planes, W, p.slabs);
  if (p.partial) {
    const auto sums = p.grads == 1 ? bn_backward_sums_kernel<T, W, 1> : bn_backward_sums_kernel<T, W, BnBackwardParams::kMostGrads>;
    int error = static_cast<int>(launch(sums, over.grid, over.block, 0, stream, p));
    if (!error) error = static_cast<int>(launch(bn_backward_finish_kernel<T>, finish_grid(p.planes.channels), kFinishBlock, 0, stream, p));
    if (error) return error;
    if (p.joined) {  // the second pass reads the sum that the first one wrote
      p.g[0] = p.joined;
      p.grads = 1;
      p.mask = nullptr;
      p.joined = nullptr;
    }
  }
  if (!p.gx) return 0;
  if (p.batch_statistics && (p.grads != 1 || !p.partial)) return static_cast<int>(cudaErrorInvalidValue);
  const auto constant = p.grads == 1 ? bn_backward_x_kernel<T, W, false, 1> : bn_backward_x_kernel<T, W, false, BnBackwardParams::kMostGrads>;
  const auto kernel = p.batch_statistics ? bn_backward_x_kernel<T, W, true, 1> : constant;
  return static_cast<int>(launch(kernel, over.grid, over.block, 0, stream, p));
}
}  // namespace

int launch_bn_statistics(const BnStatisticsParams& p, void* stream) {
  if (p.planes.numel() == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return p.planes.vectors(kVec<T>) && aligned16(p.x) ? statistics<T, kVec<T>>(p, st) : statistics<T, 1>(p, st);
  });
}

int launch_bn_apply(const BnApplyParams& p, void* stream) {
  if (p.planes.numel() == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (!aligned16(p.x, p.skip, p.y)) return apply_flat<T, 1>(p, st);
    if (!p.planes.vectors(kGroup)) return apply_flat<T, kVec<T>>(p, st);
    const ChannelLaunch over(p.planes, kGroup, 0);
    return static_cast<int>(launch(bn_apply_kernel<T>, over.grid, over.block, 0, st, p));
  });
}

int launch_bn_backward(const BnBackwardParams& p, void* stream) {
  if (p.planes.numel() == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = p.planes.vectors(kVec<T>) && aligned16(p.g[0], p.g[1], p.g[2], p.g[3], p.x, p.joined, p.gx);
    return wide ? backward<T, kVec<T>>(p, st) : backward<T, 1>(p, st);
  });
}

FISNET_LAUNCHER(bn_statistics, launch_bn_statistics);
FISNET_LAUNCHER(bn_apply, launch_bn_apply);
FISNET_LAUNCHER(bn_backward, launch_bn_backward);
FISNET_KERNEL(bn_moments_kernel<float, 4>);
FISNET_KERNEL(bn_moments_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(bn_finish_kernel<float>);
FISNET_KERNEL(bn_apply_kernel<float>);
FISNET_KERNEL(bn_apply_kernel<__nv_bfloat16>);
FISNET_KERNEL(bn_apply_flat_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(bn_backward_sums_kernel<float, 4, 1>);
FISNET_KERNEL(bn_backward_sums_kernel<float, 4, 4>);
FISNET_KERNEL(bn_backward_sums_kernel<__nv_bfloat16, 8, 1>);
FISNET_KERNEL(bn_backward_sums_kernel<__nv_bfloat16, 8, 4>);
FISNET_KERNEL(bn_backward_finish_kernel<float>);
FISNET_KERNEL(bn_backward_x_kernel<float, 4, true, 1>);
FISNET_KERNEL(bn_backward_x_kernel<__nv_bfloat16, 8, true, 1>);
}  // namespace fisnet
