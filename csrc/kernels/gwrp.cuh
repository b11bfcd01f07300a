// Global weighted rank pooling, G = sum_i d^i x_(i) / sum_i d^i with x_(0) >= x_(1) >= ...: keys that sort like numbers,
// a sort in shared memory, the search of the k-th largest, and the weights.
//
// Values are ranked as items (key, index): descending keys, ascending indices. No two items are equal, so their order is
// one order, whatever order they were put in: that is what makes the atomics here harmless, and ties deterministic (the
// first index first).
#pragma once
#include "../device/numeric.cuh"

namespace fisnet {
template <typename A> struct KeyOf { using type = uint32_t; };
template <> struct KeyOf<double> { using type = uint64_t; };
template <typename A> using Key = typename KeyOf<A>::type;

// Unsigned integers in the order of the numbers; NaN is the largest. 0 is the key of no number: it pads.
__device__ __forceinline__ uint32_t to_key(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return ~0u;
  return u >> 31 ? ~u : u | 0x80000000u;
}
__device__ __forceinline__ float from_key(uint32_t k) { return __uint_as_float(k >> 31 ? k & 0x7fffffffu : ~k); }
__device__ __forceinline__ uint64_t to_key(double x) {
  uint64_t u;
  memcpy(&u, &x, sizeof u);
  if (x != x) return ~uint64_t{0};
  return u >> 63 ? ~u : u | (uint64_t{1} << 63);
}
__device__ __forceinline__ double from_key(uint64_t k) {
  const uint64_t u = k >> 63 ? k & ~(uint64_t{1} << 63) : ~k;
  double x;
  memcpy(&x, &u, sizeof x);
  return x;
}

constexpr uint32_t kNoIndex = ~0u;  // of padding, which ranks last

template <typename K>
__device__ __forceinline__ bool ranks_before(K key, uint32_t index, K other, uint32_t other_index) {
  return key > other || (key == other && index < other_index);
}

// Items in shared memory, as two arrays. The lowest five bits of a place are exchanged so that threads which reach for every
// 8th or every 64th item meet different banks. Room is a multiple of 32.
template <typename K>
struct Items {
  K* key;
  uint32_t* index;

  static __device__ __forceinline__ int place(int i) { return i ^ ((i >> 5) & 7) ^ (((i >> 6) & 3) << 3); }
  __device__ __forceinline__ void get(K& k, uint32_t& x, int i) const {
    k = key[place(i)];
    x = index[place(i)];
  }
  __device__ __forceinline__ void set(int i, K k, uint32_t x) const {
    key[place(i)] = k;
    index[place(i)] = x;
  }
};

// ---- bitonic sort --------------------------------------------------------------------------------------------------------
// Eight items of one thread, `s` apart in the array: the levels that compare items `lowest` apart or more, all in one
// direction; or, for kRun = 2 and 4, the stage that makes sorted runs of so many of the eight, in turn forwards and backwards.
template <int kRun, typename K>
__device__ __forceinline__ void compare_eight(K (&key)[8], uint32_t (&index)[8], bool forward, int s, int lowest) {
  FISNET_UNROLL
  for (int apart = kRun / 2; apart; apart /= 2) {
    if (kRun == 8 && apart * s < lowest) continue;
    FISNET_UNROLL
    for (int a = 0; a < 8; ++a) {
      if (a & apart) continue;
      const int b = a + apart;
      const bool swap = ranks_before(key[b], index[b], key[a], index[a]) == (kRun == 8 ? forward : (a & kRun) == 0);
      const K k = key[a];
      const uint32_t x = index[a];
      key[a] = swap ? key[b] : k;
      index[a] = swap ? index[b] : x;
      key[b] = swap ? k : key[b];
      index[b] = swap ? x : index[b];
    }
  }
}

// Sorts `size` items (a power of two, 8 or more); `threads` is a multiple of 32, `sync` a barrier of them. Three levels of the
// network for one access. Where s <= 32 a warp keeps to its own 256 items, so warps need not wait for each other.
template <typename K, typename Sync>
__device__ __forceinline__ void sort_items(const Items<K>& items, int size, int tid, int threads, Sync sync) {
  bool alone = false;  // whether the accesses before kept to the warp's own items
  for (int run = 8; run <= size; run *= 2) {  // stages: runs of so many items, forwards and backwards in turn
    int lowest = 1;
    while (lowest * 8 <= run / 2) lowest *= 8;
    for (; lowest; lowest /= 8) {
      const int s = min(lowest, run / 8);
      if (alone && s <= 32) __syncwarp(); else sync();
      alone = s <= 32;
      for (int q = tid; q < size / 8; q += threads) {
        const int i = ((q & ~(s - 1)) << 3) | (q & (s - 1));
        K key[8];
        uint32_t index[8];
        FISNET_UNROLL
        for (int j = 0; j < 8; ++j) items.get(key[j], index[j], i + j * s);
        if (run == 8) {
          compare_eight<2>(key, index, true, s, 1);
          compare_eight<4>(key, index, true, s, 1);
        }
        compare_eight<8>(key, index, (i & run) == 0, s, lowest);
        FISNET_UNROLL
        for (int j = 0; j < 8; ++j) items.set(i + j * s, key[j], index[j]);
      }
    }
  }
  sync();
}

// ---- weights ---------------------------------------------------------------------------------------------------------------
// d^i / sum_i d^i for i = first, first + step, ...; in float64, because a power of a rounded d is off by i roundings.
struct RankWeights {
  double now, factor;

  __device__ RankWeights(double log2_d, double scale, int first, int step) {
    now = first ? exp2(first * log2_d) * scale : scale;
    factor = exp2(step * log2_d);
  }
  __device__ __forceinline__ double next() {
    const double w = now;
    now *= factor;
    return w;
  }
};

// This thread's part of sum_i w_i x_(i) over sorted items, i < k; stores the ranked indices where they are wanted.
template <typename A>
__device__ __forceinline__ A weigh(const Items<Key<A>>& items, int k, double log2_d, double scale, int tid, int threads, int* ranked) {
  A sum = 0;
  RankWeights w(log2_d, scale, tid, threads);
  for (int i = tid; i < k; i += threads) {
    Key<A> key;
    uint32_t index;
    items.get(key, index, i);
    sum += static_cast<A>(w.next()) * from_key(key);
    if (ranked) ranked[i] = static_cast<int>(index);
  }
  return sum;
}

// ---- search of the k largest ---------------------------------------------------------------------------------------------
constexpr int kDigit = 11;  // bits decided by one histogram
constexpr int kBins = 1 << kDigit;

// Where the need-th largest item lies in a histogram: found = {bin, items above that bin, items in it}. For a block of a
// multiple of 32 threads; part holds one number a thread.
__device__ __forceinline__ void find_bin(const unsigned* bins, unsigned need, unsigned* part, unsigned* found, int tid, int threads) {
  const int own = kBins / threads;  // bins a thread, from the top
  unsigned mine = 0;
  for (int j = 0; j < own; ++j) mine += bins[kBins - 1 - tid * own - j];
  part[tid] = mine;
  __syncthreads();
  if (tid < 32) {
    const int parts = threads / 32;
    unsigned sum = 0;
    for (int j = 0; j < parts; ++j) sum += part[tid * parts + j];
    unsigned upto = sum;  // inclusive prefix sum over the lanes
    for (int lane = 1; lane < 32; lane *= 2) {
      const unsigned before = __shfl_up_sync(~0u, upto, static_cast<unsigned>(lane));
      if (tid >= lane) upto += before;
    }
    unsigned above = upto - sum;
    if (above < need && need <= upto) {  // exactly one lane
      int j = tid * parts;
      while (above + part[j] < need) above += part[j++];
      int bin = kBins - 1 - j * own;
      while (above + bins[bin] < need) above += bins[bin--];
      found[0] = static_cast<unsigned>(bin);
      found[1] = above;
      found[2] = bins[bin];
    }
  }
  __syncthreads();
}

// The range of items that a search has narrowed the k-th largest down to: those at or above `key` (and then `order`, which
// counts down with the index) whose digits so far are the same.
template <typename K>
struct Bracket {
  K key = 0;
  uint32_t order = 0;
  int shift = static_cast<int>(sizeof(K)) * 8;  // bits not decided yet, of the key or, later, of the order
  bool ties = false;                            // all of the key is decided

  static constexpr int digit_of(int bits) { return bits > kDigit ? kDigit : bits; }
  __device__ __forceinline__ bool contains(K k, uint32_t o) const {
    if (ties) return k == key && (o >> (shift - 1) >> 1) == (order >> (shift - 1) >> 1);
    return (k >> (shift - 1) >> 1) == (key >> (shift - 1) >> 1);
  }
  __device__ __forceinline__ unsigned bin(K k, uint32_t o) const {
    const int digit = digit_of(shift);
    return static_cast<unsigned>(ties ? o >> (shift - digit) : k >> (shift - digit)) & ((1u << digit) - 1);
  }
  __device__ __forceinline__ void narrow(unsigned bin, int order_bits) {
    shift -= digit_of(shift);
    if (ties) order |= bin << shift; else key |= static_cast<K>(bin) << shift;
    if (shift == 0 && !ties) { ties = true; shift = order_bits; }
  }
  // Whether an item is in the bracket or ranks before it.
  __device__ __forceinline__ bool takes(K k, uint32_t o) const { return k > key || (k == key && o >= order); }
};

// Calls put(slot) for the lanes that take part, with consecutive slots from a shared counter. For all lanes of a warp.
template <typename F>
__device__ __forceinline__ void with_slot(bool take, unsigned* counter, F&& put) {
  const unsigned votes = __ballot_sync(~0u, take);
  if (!votes) return;
  const int lane = static_cast<int>(threadIdx.x & 31);
  unsigned first = 0;
  if (lane == 0) first = atomicAdd(counter, static_cast<unsigned>(__popc(votes)));
  first = __shfl_sync(~0u, first, 0);
  if (take) put(first + static_cast<unsigned>(__popc(votes & ((1u << lane) - 1))));
}
}  // namespace fisnet
