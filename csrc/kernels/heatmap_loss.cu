#include "heatmap_loss.h"

#include "../device/bytes.cuh"
#include "../device/maps.cuh"
#include "gwrp.cuh"

namespace fisnet {
namespace {
constexpr int kRowThreads = 512;   // of a block that ranks one row
constexpr int kWarpRows = 8;       // rows of a block that ranks one a warp
constexpr int kMergeThreads = 256;
constexpr int kSums = 4;           // |R| M, R M, M, and |R| (1 - M) or G

// One channel of one map, and the mask over it.
template <typename T>
struct Row {
  const T* R;
  const void* mask;
  int pixels, stride;
  bool bytes;

  __device__ Row(const HeatmapShape& s, const void* R_all, const void* mask_all, int64_t row) : pixels(s.pixels), stride(s.interleaved ? s.channels : 1), bytes(s.mask_bytes) {
    const int64_t map = row / s.channels;
    const int c = static_cast<int>(row - map * s.channels);
    R = static_cast<const T*>(R_all) + offset(s, row);
    const int64_t at = (map / s.maps * s.mask_channels + (s.mask_channels == 1 ? 0 : c)) * s.pixels;
    mask = bytes ? static_cast<const void*>(static_cast<const uint8_t*>(mask_all) + at) : static_cast<const void*>(static_cast<const Acc<T>*>(mask_all) + at);
  }
  static __device__ __forceinline__ int64_t offset(const HeatmapShape& s, int64_t row) {
    if (!s.interleaved) return row * s.pixels;
    const int64_t map = row / s.channels;
    return map * s.channels * s.pixels + (row - map * s.channels);
  }

  // W values of R and of the mask, fetched together and turned into numbers where they are used.
  template <int W> class Pixels {
   public:
    __device__ __forceinline__ void fetch(const Row& row, int i) {
      R_.fetch(row.R, static_cast<int64_t>(i) * row.stride);
      if (row.bytes) {
        bytes_.fetch(static_cast<const uint8_t*>(row.mask) + i);
      } else {
        FISNET_UNROLL
        for (int j = 0; j < W / kWide; ++j) values_[j].fetch(static_cast<const A*>(row.mask), i + j * kWide);
      }
    }
    __device__ __forceinline__ Acc<T> R(int j) const { return R_[j]; }
    __device__ __forceinline__ Acc<T> M(const Row& row, int j) const { return row.bytes ? static_cast<A>(bytes_[j]) : values_[j / kWide][j % kWide]; }

   private:
    using A = Acc<T>;
    static constexpr int kWide = W == 1 ? 1 : kVec<A>;
    Raw<T, W> R_;
    RawBytes<W> bytes_;
    Raw<A, kWide> values_[W / kWide];
  };
  template <int W>
  __device__ __forceinline__ Pixels<W> at(int i) const {
    Pixels<W> pixels;
    pixels.fetch(*this, i);
    return pixels;
  }

  // f(i, R, M, whether the pixel exists), the same number of times in all threads, so that warps stay together. Several
  // vectors are read before the first is used, and between() is called after them.
  template <int W, typename F, typename Between>
  __device__ __forceinline__ void each_pixel(int tid, int threads, F&& f, Between&& between) const {
    constexpr int kAhead = W == 1 ? 4 : 2;
    for (int64_t start = 0; start < pixels; start += static_cast<int64_t>(threads) * W * kAhead) {
      Pixels<W> of[kAhead];
      const int first = static_cast<int>(start) + tid * W;
      FISNET_UNROLL
      for (int u = 0; u < kAhead; ++u) of[u].fetch(*this, min(first + u * threads * W, pixels - W));  // no branch between the loads
      FISNET_UNROLL
      for (int u = 0; u < kAhead; ++u) {
        const int i = first + u * threads * W;
        FISNET_UNROLL
        for (int j = 0; j < W; ++j) f(i + j, of[u].R(j), of[u].M(*this, j), i < pixels);
      }
      between();
    }
  }
  template <int W, typename F>
  __device__ __forceinline__ void each_pixel(int tid, int threads, F&& f) const {
    each_pixel<W>(tid, threads, f, [] {});
  }
};

template <typename A>
__device__ __forceinline__ A magnitude(A x) { return x < A(0) ? -x : x == A(0) ? A(0) : x; }

// Adds one pixel to a row's sums and returns |R| (1 - M), what GWRP ranks.
template <typename A>
__device__ __forceinline__ A add_pixel(A (&sum)[kSums], A r, A m) {
  const A a = magnitude(r);
  sum[0] += a * m;
  sum[1] += r * m;
  sum[2] += m;
  return a * (A(1) - m);
}

template <typename A, int N>
__device__ __forceinline__ void warp_sums(A (&sum)[N]) {
  FISNET_UNROLL
  for (int j = 0; j < N; ++j)
    for (int lane = 16; lane; lane /= 2) sum[j] += __shfl_xor_sync(~0u, sum[j], lane);
}

// Sums over the block of `threads` threads, in a fixed order; the first thread gets them.
template <typename A, int N>
__device__ __forceinline__ void block_sums(A (&sum)[N], A* part, int tid, int threads) {
  warp_sums(sum);
  __syncthreads();
  FISNET_UNROLL
  for (int j = 0; j < N; ++j)
    if (tid % 32 == 0) part[tid / 32 * N + j] = sum[j];
  __syncthreads();
  if (tid) return;
  for (int w = 1; w < threads / 32; ++w) {
    FISNET_UNROLL
    for (int j = 0; j < N; ++j) sum[j] += part[w * N + j];
  }
}

template <typename A, typename S>
__device__ __forceinline__ void store_sums(const HeatmapLossParams& p, int64_t row, const S (&sum)[kSums]) {
  FISNET_UNROLL
  for (int j = 0; j < kSums; ++j) static_cast<A*>(p.sums)[row * kSums + j] = static_cast<A>(sum[j]);
}

// Foreground sums and GWRP of a row: inside = sum |R| M, sum R M, area = sum M, G = sum_i w_i sort_desc(|R| (1 - M))_i.
// A block owns a row. The keys of |R| (1 - M) go to shared memory, all of them where they fit; else histograms of 11 bits
// at a time narrow the k-th largest down until what is left fits: one more pass over the row, out of the L2 cache, and more
// where values hardly differ. There the search goes on until no more than can be sorted is left, and that is sorted.
// With d = 1, or too many ranks for this, only the sums (and the mean) are made here.
// Shared memory: `capacity` keys and indices, 2048 counters, a counter a thread. Accumulates a few pixels at a time in
// float32 (float64 for float64), their sums in float64; weights are float64. Deterministic: counters are integers, and the
// sort gives one order whatever order items arrive in.
// no 16-byte stores: a block leaves a few sums, and ranks scattered over its map
template <typename T, int W>
__global__ void __launch_bounds__(kRowThreads, sizeof(Acc<T>) == 8 ? 1 : 2) heatmap_row_kernel(HeatmapLossParams p, GwrpPlan plan) {
  using A = Acc<T>;
  using K = Key<A>;
  FISNET_DYN_SMEM(K, keys);
  const Items<K> items{keys, reinterpret_cast<uint32_t*>(keys + plan.capacity)};
  unsigned* const bins = items.index + plan.capacity;
  FISNET_SHARED(unsigned, part, kRowThreads);
  FISNET_SHARED(double, part_sums, kSums * kRowThreads / 32);
  FISNET_SHARED(unsigned, found, 4);  // of find_bin; and the number of items put into shared memory
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), k = p.ranking.k;
  const int64_t row_at = blockIdx.x;
  const Row<T> row(p.shape, p.R, p.mask, row_at);
  const int n = row.pixels;
  const bool ranked = plan.path == GwrpPath::kBlock;
  bool here = n <= plan.capacity;  // whether the items are in shared memory
  Bracket<K> bracket;

  const auto clear = [&] {
    for (int j = tid; j < kBins; j += threads) bins[j] = 0;
    if (tid == 0) found[3] = 0;
    __syncthreads();
  };
  if (ranked) clear();
  A few[kSums] = {};
  double sum[kSums] = {};
  row.template each_pixel<W>(tid, threads, [&](int i, A r, A m, bool exists) {
    if (!exists) return;
    const A value = add_pixel(few, r, m);
    if (!ranked) {
      few[3] += value;
    } else if (here) {
      items.set(i, to_key(value), static_cast<uint32_t>(i));
    } else {
      atomicAdd(&bins[bracket.bin(to_key(value), 0)], 1u);
    }
  }, [&] {
    FISNET_UNROLL
    for (int j = 0; j < kSums; ++j) {
      sum[j] += static_cast<double>(few[j]);
      few[j] = 0;
    }
  });
  if (!ranked) {
    block_sums(sum, part_sums, tid, threads);
    sum[3] = plan.path == GwrpPath::kMean ? sum[3] / n : 0;
    if (tid == 0) store_sums<A>(p, row_at, sum);
    return;
  }
  __syncthreads();

  int count = n, order_bits = 1;  // items in the bracket or above it
  while (order_bits < 31 && ((n - 1) >> order_bits)) ++order_bits;
  unsigned above = 0;
  const auto order_of = [&](uint32_t i) { return static_cast<uint32_t>(n - 1) - i; };
  const auto value_key = [](A r, A m) { return to_key(magnitude(r) * (A(1) - m)); };
  for (bool counted = !here; count > plan.sorted; counted = false) {
    if (!counted) {
      clear();
      if (here) {
        for (int j = tid; j < count; j += threads) {
          K key;
          uint32_t i;
          items.get(key, i, j);
          if (bracket.contains(key, order_of(i))) atomicAdd(&bins[bracket.bin(key, order_of(i))], 1u);
        }
      } else {
        row.template each_pixel<W>(tid, threads, [&](int i, A r, A m, bool exists) {
          const K key = value_key(r, m);
          if (exists && bracket.contains(key, order_of(static_cast<uint32_t>(i)))) atomicAdd(&bins[bracket.bin(key, order_of(static_cast<uint32_t>(i)))], 1u);
        });
      }
      __syncthreads();
    }
    find_bin(bins, static_cast<unsigned>(k) - above, part, found, tid, threads);
    bracket.narrow(found[0], order_bits);
    above += found[1];
    const int left = static_cast<int>(above + found[2]);
    if (here) {
      if (left > plan.sorted) continue;
      clear();
      for (int start = 0; start < count; start += threads) {  // in place: slots never overtake what has been read
        const int j = start + tid;
        K key = 0;
        uint32_t i = 0;
        if (j < count) items.get(key, i, j);
        __syncthreads();
        with_slot(j < count && bracket.takes(key, order_of(i)), &found[3], [&](unsigned slot) { items.set(static_cast<int>(slot), key, i); });
      }
      count = left;
    } else if (left <= plan.capacity) {
      clear();
      row.template each_pixel<W>(tid, threads, [&](int i, A r, A m, bool exists) {
        const K key = value_key(r, m);
        with_slot(exists && bracket.takes(key, order_of(static_cast<uint32_t>(i))), &found[3], [&](unsigned slot) { items.set(static_cast<int>(slot), key, static_cast<uint32_t>(i)); });
      });
      count = left;
      here = true;
    }
    __syncthreads();
  }

  for (int j = count + tid; j < plan.sorted; j += threads) items.set(j, 0, kNoIndex);
  sort_items(items, plan.sorted, tid, threads, [] { __syncthreads(); });
  sum[3] = static_cast<double>(weigh<A>(items, k, p.ranking.log2_d, p.ranking.scale, tid, threads, p.index ? static_cast<int*>(p.index) + row_at * k : nullptr));
  block_sums(sum, part_sums, tid, threads);
  if (tid == 0) store_sums<A>(p, row_at, sum);
}

// The same for rows of at most 256 pixels: a warp owns a row and sorts all of it in shared memory.
// no 16-byte loads and stores: maps of at most 256 pixels, a warp a map, of any alignment
template <typename T>
__global__ void __launch_bounds__(32 * kWarpRows) heatmap_warp_kernel(HeatmapLossParams p, GwrpPlan plan) {
  using A = Acc<T>;
  using K = Key<A>;
  FISNET_DYN_SMEM(K, all_keys);
  const int lane = static_cast<int>(threadIdx.x), w = static_cast<int>(threadIdx.y), k = p.ranking.k;
  const int64_t row_at = static_cast<int64_t>(blockIdx.x) * kWarpRows + w;
  if (row_at >= p.shape.rows()) return;
  const Items<K> items{all_keys + w * plan.capacity, reinterpret_cast<uint32_t*>(all_keys + kWarpRows * plan.capacity) + w * plan.capacity};
  const Row<T> row(p.shape, p.R, p.mask, row_at);
  A sum[kSums] = {};
  for (int i = lane; i < plan.sorted; i += 32) {
    const bool exists = i < row.pixels;
    typename Row<T>::template Pixels<1> of;
    if (exists) of.fetch(row, i);
    const A value = add_pixel(sum, of.R(0), of.M(row, 0));
    items.set(i, exists ? to_key(value) : K(0), exists ? static_cast<uint32_t>(i) : kNoIndex);
  }
  sort_items(items, plan.sorted, lane, 32, [] { __syncwarp(); });
  sum[3] = weigh<A>(items, k, p.ranking.log2_d, p.ranking.scale, lane, 32, p.index ? static_cast<int*>(p.index) + row_at * k : nullptr);
  warp_sums(sum);
  if (lane == 0) store_sums<A>(p, row_at, sum);
}

// ---- more than 4096 ranks: sorted chunks, merged in global memory ------------------------------------------------------------
// A block sorts 4096 neighbouring pixels of a row in shared memory.
// no 16-byte loads and stores: keys are made of a value and its mask and sorted in shared memory
template <typename T>
__global__ void __launch_bounds__(kRowThreads, 2) heatmap_chunk_kernel(HeatmapLossParams p, GwrpPlan plan) {
  using A = Acc<T>;
  using K = Key<A>;
  FISNET_DYN_SMEM(K, keys);
  const Items<K> items{keys, reinterpret_cast<uint32_t*>(keys + plan.sorted)};
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int64_t row_at = blockIdx.x / static_cast<unsigned>(plan.chunks);
  const int start = static_cast<int>(blockIdx.x % static_cast<unsigned>(plan.chunks)) * plan.sorted;
  const Row<T> row(p.shape, p.R, p.mask, row_at);
  for (int j = tid; j < plan.sorted; j += threads) {
    const int i = start + j;
    A unused[kSums] = {};
    typename Row<T>::template Pixels<1> of;
    if (i < row.pixels) of.fetch(row, i);
    items.set(j, i < row.pixels ? to_key(add_pixel(unused, of.R(0), of.M(row, 0))) : K(0), i < row.pixels ? static_cast<uint32_t>(i) : kNoIndex);
  }
  sort_items(items, plan.sorted, tid, threads, [] { __syncthreads(); });
  const int64_t to = row_at * row.pixels + start;
  for (int j = tid; j < min(plan.sorted, row.pixels - start); j += threads) {
    items.get(static_cast<K*>(p.key_a)[to + j], static_cast<uint32_t*>(p.index_a)[to + j], j);
  }
}

// Merges neighbouring sorted runs of `length` items of each row into runs twice as long; of every run, old and new, only the
// first k items count. A thread owns an item: its new place is its own rank plus the number of items of the other run that
// rank before it. `out_size` is the distance of the rows written. No shared memory. Deterministic.
// no 16-byte loads and stores: a merge finds the place of every key by itself
template <typename K>
__global__ void __launch_bounds__(kMergeThreads) heatmap_merge_kernel(
    const K* __restrict__ key, const uint32_t* __restrict__ index, K* __restrict__ key_out, uint32_t* __restrict__ index_out, int pixels, int length, int k, int out_size) {
  const unsigned blocks = (static_cast<unsigned>(pixels) + kMergeThreads - 1) / kMergeThreads;  // a row
  const int64_t row = blockIdx.x / blocks;
  const int at = static_cast<int>(blockIdx.x % blocks) * kMergeThreads + static_cast<int>(threadIdx.x);
  if (at >= pixels) return;
  const int run = at / length, rank = at - run * length;
  const int64_t other = static_cast<int64_t>(run ^ 1) * length;
  if (rank >= k) return;
  const K mine = key[row * pixels + at];
  const uint32_t mine_index = index[row * pixels + at];
  int low = 0, high = other < pixels ? min(min(length, k), pixels - static_cast<int>(other)) : 0;
  while (low < high) {
    const int middle = (low + high) / 2;
    const int64_t j = row * pixels + other + middle;
    if (ranks_before(key[j], index[j], mine, mine_index)) low = middle + 1; else high = middle;
  }
  if (rank + low >= k) return;
  const int64_t to = row * out_size + static_cast<int64_t>(run & ~1) * length + rank + low;
  key_out[to] = mine;
  index_out[to] = mine_index;
}

// G of rows whose first k keys are sorted, [rows, k]: a block owns a row. Deterministic.
// no 16-byte loads and stores: sorted keys are read in order, neighbouring threads neighbouring ranks
template <typename A>
__global__ void __launch_bounds__(kRowThreads) heatmap_weigh_kernel(const Key<A>* __restrict__ key, A* __restrict__ sums, Ranking ranking) {
  FISNET_SHARED(A, part, kRowThreads / 32);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t row = blockIdx.x;
  A sum[1] = {};
  RankWeights w(ranking.log2_d, ranking.scale, tid, kRowThreads);
  for (int i = tid; i < ranking.k; i += kRowThreads) sum[0] += static_cast<A>(w.next()) * from_key(key[row * ranking.k + i]);
  block_sums(sum, part, tid, kRowThreads);
  if (tid == 0) sums[row * kSums + 3] = sum[0];
}

// ---- the losses ----------------------------------------------------------------------------------------------------------------
// The foreground loss of one map at F, and its derivative (before the mean over maps).
__device__ __forceinline__ double foreground_of(int kind, double F, double c1, double c2, double& slope) {
  const double u = F / c1 > 1 ? 1 : F / c1;
  double value = (u - 1) * (u - 1);
  slope = 2 * (u - 1) / c1;
  const double x = F / c1 - c2 / c1;  // how far beyond the range
  if (kind == kL1) {
    if (F >= c2) { value += F - c2; slope += 1; }
  } else if (kind == kL2) {
    if (x > 0) { value += x * x; slope += 2 * x / c1; }
  } else {  // hybrid: the square saturates at 1, where F = c1 + c2 and the line takes over
    if (x > 1) value += 1;
    else if (x > 0) { value += x * x; slope += 2 * x / c1; }
    if (F >= c1 + c2) { value += F - (c1 + c2); slope += 1; }
  }
  return value;
}

// From the rows' sums to the losses and their slopes. With f = inside / (area + 1e-10) + 1e-10 the foreground mean and
// q = G / (f E):  background = mean of log(1 + min(q, 1e7 - 1)), which is constant beyond.
// A warp owns a sample. In float64: few numbers, of all magnitudes. Deterministic.
// no 16-byte loads and stores: a handful of sums a sample
template <typename A>
__global__ void __launch_bounds__(32) heatmap_finish_kernel(HeatmapLossParams p) {
  constexpr double kEps = 1e-10, kMaxOdds = 1e7 - 1;
  const int lane = static_cast<int>(threadIdx.x), C = p.shape.channels;
  const int64_t n = blockIdx.x;
  double background = 0, foreground = 0;
  for (int k = 0; k < p.shape.maps; ++k) {
    const int64_t map = n * p.shape.maps + k;
    const A* const sums = static_cast<const A*>(p.sums) + map * C * kSums;
    A* const slope_G = static_cast<A*>(p.slope_G) + map * C;
    double total[3] = {};  // |R| M, R M, M over the channels
    for (int c = lane; c < C; c += 32)
      for (int j = 0; j < 3; ++j) total[j] += static_cast<double>(sums[c * kSums + j]);
    warp_sums(total);
    const double area = total[2] + kEps;
    double mean = 1, sign = 1;  // what G is divided by, and its direction
    if (p.normalization == kAbsRoIMean) mean = total[0] / area + kEps;
    else if (p.normalization == kRoIMean) mean = total[1] / area + kEps;
    else mean = 1 / (static_cast<double>(C) * p.shape.pixels);
    if (mean < 0) { mean = -mean; sign = -1; }

    double sum[2] = {};  // log(1 + q); -d background / d mean
    for (int c = lane; c < C; c += 32) {
      const double G = static_cast<double>(sums[c * kSums + 3]), q = G / mean / p.E;
      const double slope = q > kMaxOdds ? 0 : 1 / (1 + q) / p.E / mean / (static_cast<double>(C) * p.shape.maps);
      sum[0] += log1p(q > kMaxOdds ? kMaxOdds : q);
      sum[1] += q > kMaxOdds ? 0 : slope * (G / mean);
      slope_G[c] = static_cast<A>(slope);
    }
    warp_sums(sum);
    background += sum[0] / C;
    const double c1 = p.c1_k ? static_cast<double>(static_cast<const A*>(p.c1_k)[p.c1_count == 1 ? 0 : k]) : p.c1;
    const double c2 = p.c2_k ? static_cast<double>(static_cast<const A*>(p.c2_k)[p.c2_count == 1 ? 0 : k]) : p.c2;
    double slope_F;
    foreground += foreground_of(p.foreground, total[0], c1, c2, slope_F);
    if (lane == 0) {
      A* const to = static_cast<A*>(p.slope_F) + map * 2;
      to[0] = static_cast<A>(p.normalization == kNone ? 0 : -sign * sum[1] / area);
      to[1] = static_cast<A>(slope_F / p.shape.maps);
    }
  }
  if (lane) return;
  static_cast<A*>(p.background)[n] = static_cast<A>(background / p.shape.maps);
  static_cast<A*>(p.foreground_loss)[n] = static_cast<A>(foreground / p.shape.maps);
}

// ---- the adjoint ---------------------------------------------------------------------------------------------------------------
// R_bar = sign(R) ((1 - M) slope_G w + M inside) + M signed, with w the weight of the pixel's rank (0 where it has none).
// threadIdx.y is a row of the block, blockIdx.y a part of its pixels. First every pixel as if it had no rank, then the ranked
// ones of this part again. No shared memory. Accumulates in float32 (float64 for float64). Deterministic.
template <typename T, int W>
__global__ void __launch_bounds__(256, 4) heatmap_backward_kernel(HeatmapLossBackwardParams p, int part) {
  using A = Acc<T>;
  const int64_t rows = p.shape.rows(), row_at = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool exists = row_at < rows;
  const int64_t at = exists ? row_at : 0, map = at / p.shape.channels, n = map / p.shape.maps;
  const Row<T> row(p.shape, p.R, p.mask, at);
  T* const R_bar = static_cast<T*>(p.R_bar) + Row<T>::offset(p.shape, at);
  const int tid = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), k = p.ranking.k;
  const int start = static_cast<int>(blockIdx.y) * part, end = exists ? min(row.pixels - start, part) + start : start;

  const A background_bar = static_cast<const A*>(p.background_bar)[n * p.background_step];
  const A* const slope_F = static_cast<const A*>(p.slope_F) + map * 2;
  const A through_mean = background_bar * slope_F[0];
  const A direct = static_cast<const A*>(p.foreground_bar)[n * p.foreground_step] * slope_F[1];
  const A inside = p.normalization == kRoIMean ? direct : direct + through_mean;
  const A with_sign = p.normalization == kRoIMean ? through_mean : A(0);
  const A outside = background_bar * static_cast<const A*>(p.slope_G)[at];
  const auto adjoint = [&](A r, A m, A w) {
    const A sign = r > A(0) ? A(1) : r < A(0) ? A(-1) : r == A(0) ? A(0) : r;  // NaN stays NaN
    return sign * ((A(1) - m) * (outside * w) + m * inside) + m * with_sign;
  };

  const A mean_weight = k ? A(0) : A(1) / static_cast<A>(row.pixels);
  for (int i = start + tid * W; i < end; i += threads * W) {
    const auto of = row.template at<W>(i);
    A r[W];
    FISNET_UNROLL
    for (int j = 0; j < W; ++j) r[j] = adjoint(of.R(j), of.M(row, j), mean_weight);
    store<T, W>(R_bar + static_cast<int64_t>(i) * row.stride, r);
  }
  __syncthreads();
  const int* const ranked = static_cast<const int*>(p.index) + at * k;
  RankWeights weights(p.ranking.log2_d, p.ranking.scale, tid, threads);
  for (int j = tid; j < (exists ? k : 0); j += threads) {
    const A w = static_cast<A>(weights.next());
    const int i = ranked[j];
    if (i < start || i >= end) continue;
    const auto of = row.template at<1>(i);
    R_bar[static_cast<int64_t>(i) * row.stride] = from_acc<T>(adjoint(of.R(0), of.M(row, 0), w));
  }
}

// ---- launches ------------------------------------------------------------------------------------------------------------------
template <typename T>
int rank_rows(const HeatmapLossParams& p, const GwrpPlan& plan, bool wide, cudaStream_t stream) {
  const int64_t rows = p.shape.rows();
  const size_t item = sizeof(Key<Acc<T>>) + sizeof(uint32_t);
  if (plan.path == GwrpPath::kWarp) {
    const unsigned blocks = static_cast<unsigned>(ceil_div<int64_t>(rows, kWarpRows));
    return static_cast<int>(launch(heatmap_warp_kernel<T>, dim3(blocks), dim3(32, kWarpRows), kWarpRows * static_cast<size_t>(plan.capacity) * item, stream, p, plan));
  }
  const size_t smem = plan.path == GwrpPath::kBlock ? static_cast<size_t>(plan.capacity) * item + kBins * sizeof(unsigned) : 0;
  const dim3 grid(static_cast<unsigned>(rows)), block(p.shape.pixels <= 2048 ? 128 : kRowThreads);
  return static_cast<int>(wide ? launch(heatmap_row_kernel<T, kVec<T>>, grid, block, smem, stream, p, plan)
                               : launch(heatmap_row_kernel<T, 1>, grid, block, smem, stream, p, plan));
}

template <typename T>
int rank_chunks(const HeatmapLossParams& p, const GwrpPlan& plan, cudaStream_t stream) {
  using A = Acc<T>;
  using K = Key<A>;
  const int64_t rows = p.shape.rows();
  const size_t smem = static_cast<size_t>(plan.sorted) * (sizeof(K) + sizeof(uint32_t));
  int error = static_cast<int>(launch(heatmap_chunk_kernel<T>, dim3(static_cast<unsigned>(rows * plan.chunks)), dim3(kRowThreads), smem, stream, p, plan));
  const K* key = static_cast<const K*>(p.key_a);
  const uint32_t* index = static_cast<const uint32_t*>(p.index_a);
  K* key_to = static_cast<K*>(p.key_b);
  uint32_t* index_to = static_cast<uint32_t*>(p.index_b);
  const unsigned blocks = static_cast<unsigned>(rows * ceil_div(p.shape.pixels, kMergeThreads));
  for (int64_t length = plan.sorted; !error && length < p.shape.pixels; length *= 2) {
    const bool last = 2 * length >= p.shape.pixels;
    if (last && p.index) index_to = static_cast<uint32_t*>(p.index);
    error = static_cast<int>(launch(heatmap_merge_kernel<K>, dim3(blocks), dim3(kMergeThreads), 0, stream, key, index, key_to, index_to, p.shape.pixels, static_cast<int>(length),
                                    p.ranking.k, last ? p.ranking.k : p.shape.pixels));
    K* const next = const_cast<K*>(key);
    uint32_t* const next_index = const_cast<uint32_t*>(index);
    key = key_to; index = index_to;
    key_to = next; index_to = next_index;
  }
  if (error) return error;
  return static_cast<int>(launch(heatmap_weigh_kernel<A>, dim3(static_cast<unsigned>(rows)), dim3(kRowThreads), 0, stream, key, static_cast<A*>(p.sums), p.ranking));
}
}  // namespace

int launch_heatmap_loss(const HeatmapLossParams& p, void* stream) {
  if (p.shape.samples == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const GwrpPlan plan = GwrpPlan::of(p.shape.pixels, p.ranking.k, static_cast<int>(sizeof(Key<Acc<T>>) + sizeof(uint32_t)));
    const bool wide = !p.shape.interleaved && p.shape.pixels % kVec<T> == 0 && aligned16(p.R, p.mask);
    int error = rank_rows<T>(p, plan, wide, st);
    if (!error && plan.path == GwrpPath::kChunks) error = rank_chunks<T>(p, plan, st);
    if (error) return error;
    return static_cast<int>(launch(heatmap_finish_kernel<Acc<T>>, dim3(static_cast<unsigned>(p.shape.samples)), dim3(32), 0, st, p));
  });
}

int launch_heatmap_loss_backward(const HeatmapLossBackwardParams& p, void* stream) {
  if (p.shape.samples == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = !p.shape.interleaved && p.shape.pixels % kVec<T> == 0 && aligned16(p.R, p.mask, p.R_bar);
    const bool small = p.shape.pixels <= 256;
    const int parts = std::min(16, std::max(1, p.shape.pixels / 8192));
    const int part = ceil_div(ceil_div(p.shape.pixels, parts), 8) * 8;  // whole vectors
    const dim3 block(small ? 32 : 256, small ? 8 : 1);
    const dim3 grid(static_cast<unsigned>(ceil_div<int64_t>(p.shape.rows(), block.y)), static_cast<unsigned>(ceil_div(p.shape.pixels, part)));
    return static_cast<int>(wide ? launch(heatmap_backward_kernel<T, kVec<T>>, grid, block, 0, st, p, part) : launch(heatmap_backward_kernel<T, 1>, grid, block, 0, st, p, part));
  });
}

FISNET_LAUNCHER(heatmap_loss, launch_heatmap_loss);
FISNET_LAUNCHER(heatmap_loss_backward, launch_heatmap_loss_backward);
FISNET_KERNEL(heatmap_row_kernel<float, 4>);
FISNET_KERNEL(heatmap_row_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(heatmap_warp_kernel<float>);
FISNET_KERNEL(heatmap_backward_kernel<float, 4>);
FISNET_KERNEL(heatmap_backward_kernel<__nv_bfloat16, 8>);
}  // namespace fisnet
