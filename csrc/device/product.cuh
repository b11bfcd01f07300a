// Convolutions and dense layers as implicit matrix products on tensor cores: operands to shared memory, products, and the
// results handed to an epilogue. One kernel, `linear_kernel`, for both directions of the map and for Dual's pairs.
//
//   forward      D[m, n] = sum over taps (r, s) and c of x[position of m at tap (r, s), c] W[n, r, s, c]      m = (sample, p, q)
//   transposed   D[m, n] = sum over taps (r, s) and o of s[position of m at tap (r, s), o] W[o, r, s, n]      m = (sample, h, w)
//
// The depth runs over (tap, channel); a tap's channels are padded to whole 16-byte chunks. The transposed product of a map with
// stride falls into stride_y stride_x sub-problems (blockIdx.z), one for each remainder of (h, w), which have every stride-th
// tap each.
//
// A step of the depth is 64 bytes of every row of a tile: 32 elements of 2 bytes, 16 of 4, 8 of 8. kStages steps are on their
// way from global to shared memory (cp.async) while one is multiplied. 2-byte types: mma.m16n8k16; float: mma.m16n8k8 of
// operands rounded to TF32; double, for verification: fused multiply-adds in the same tiling. Accumulation in float32
// (float64 for float64), in the same order every time: deterministic.
#pragma once
#include "channels.cuh"
#include "linear.h"
#include "maps.cuh"

namespace fisnet {
constexpr int kStepBytes = 64;
constexpr int kStepChunks = kStepBytes / 16;
constexpr int kWarpN = 32;                // columns of a warp's part of the tile
constexpr int kStagePitch = kWarpN + 8;   // of the epilogue's rows in shared memory

// ---- shapes ------------------------------------------------------------------------------------------------------------------
template <int kM_, int kN_, int kWarps_, int kStages_> struct Tile {
  static constexpr int kM = kM_, kN = kN_, kWarps = kWarps_, kStages = kStages_, kThreads = 32 * kWarps;
  static constexpr int kWarpsN = kN / kWarpN, kWarpsM = kWarps / kWarpsN, kWarpM = kM / kWarpsM;
  static constexpr int kMT = kWarpM / 16, kNT = kWarpN / 8;  // a warp's mma tiles
  // On a multiprocessor: at most 128 registers a thread, or 168 where small blocks hold large parts of the tile.
  static constexpr int kMinBlocks = kThreads > 128 ? 2 : kMT > 2 ? 3 : 4;
  static_assert(kWarpsM * kWarpsN == kWarps && kMT * 16 * kWarpsM == kM, "warps share the tile evenly");
};

// What is multiplied: kOperands A tiles (relevance of one rule or of both), kProducts results of them.
//   1, 1   A W
//   1, 2   A W and A W+          W+ = max(sign W, 0) per output channel
//   2, 2   A W and A' W+         W+ = max(W, 0)
template <bool kTransposed_, int kOperands_, int kProducts_, bool kPrologue_ = false> struct Product {
  static constexpr bool kTransposed = kTransposed_, kPrologue = kPrologue_;
  static constexpr int kOperands = kOperands_, kProducts = kProducts_;
};
using Forward = Product<false, 1, 1>;
using ForwardPrologue = Product<false, 1, 1, true>;
using ForwardDual = Product<false, 1, 2>;
using ForwardPair = Product<false, 2, 2>;
using Transposed = Product<true, 1, 1>;
using TransposedPair = Product<true, 2, 2>;

// Bytes of dynamic shared memory.
template <typename T, typename Tile, typename Product> constexpr size_t product_shared() {
  constexpr size_t stages = static_cast<size_t>(Tile::kStages) * (Product::kOperands * Tile::kM + Tile::kN) * kStepBytes;
  constexpr size_t epilogue = static_cast<size_t>(Tile::kWarps) * Product::kProducts * 16 * kStagePitch * sizeof(Acc<T>);
  return stages > epilogue ? stages : epilogue;
}

struct ProductOperands {
  LinearMap map;
  int maps;               // K: relevance rows are [N, K, ...] beside activations [N, ...]
  const void* A;          // forward: [samples, height, width, c_in]; transposed: [samples, out_height, out_width, c_out]
  const void* A_plus;     // the same, of the z+ rule; with two operands
  const void* W;          // [c_out, kernel_y, kernel_x, c_in]
  const void* sign;       // [c_out] accumulation type, or null (all +1); with one operand and two products
  const void* pre_scale;  // [c_in] accumulation type: A is relu(pre_scale A + pre_shift); with the prologue
  const void* pre_shift;  // [c_in] accumulation type
};

// ---- where rows and taps lie -----------------------------------------------------------------------------------------------
// One axis: row i of the result lies at i * out_step + out_first, and its tap j reads position i * step + first + j * tap_step
// of A and tap tap_first + j * tap_every of W.
struct Axis {
  int rows, out_step, out_first, step, first, tap_step, taps, tap_first, tap_every, size;
};
inline Axis forward_axis(int out, int size, int kernel, int stride, int pad, int dilation) {
  return {out, 1, 0, stride, -pad, dilation, kernel, 0, 1, size};
}
// Positions h = i stride + remainder of the input read outputs p with p stride = h + pad - r dilation: every tap r for which the
// right side is a multiple of the stride.
inline Axis transposed_axis(int out, int size, int kernel, int stride, int pad, int dilation, int remainder) {
  int every = 1;  // taps apart that meet the same remainder
  while (every * dilation % stride) ++every;
  int r = 0;
  while (r < every && (remainder + pad - r * dilation) % stride) ++r;
  Axis axis{};
  axis.rows = remainder < size ? (size - remainder + stride - 1) / stride : 0;
  axis.out_step = stride;
  axis.out_first = remainder;
  axis.step = 1;
  axis.taps = r < every && r < kernel ? (kernel - r + every - 1) / every : 0;
  axis.first = axis.taps ? (remainder + pad - r * dilation) / stride : 0;
  axis.tap_step = -(every * dilation / stride);
  axis.tap_first = r;
  axis.tap_every = every;
  axis.size = out;
  return axis;
}

// One sub-problem: the only one of a forward product.
struct Walk {
  Axis y, x;
  int rows;      // samples times positions
  int steps;     // of the depth, for elements of a given size

  Walk() = default;
  Walk(const LinearMap& l, bool transposed, int remainder, int chunk) {
    if (transposed) {
      y = transposed_axis(l.out_height, l.height, l.kernel_y, l.stride_y, l.pad_y, l.dilation_y, remainder / l.stride_x);
      x = transposed_axis(l.out_width, l.width, l.kernel_x, l.stride_x, l.pad_x, l.dilation_x, remainder % l.stride_x);
    } else {
      y = forward_axis(l.out_height, l.height, l.kernel_y, l.stride_y, l.pad_y, l.dilation_y);
      x = forward_axis(l.out_width, l.width, l.kernel_x, l.stride_x, l.pad_x, l.dilation_x);
    }
    rows = l.samples * y.rows * x.rows;
    steps = ceil_div(y.taps * x.taps * ceil_div(transposed ? l.c_out : l.c_in, chunk), kStepChunks);
  }
};

// What a kernel is told: the operands and up to kWalks sub-problems, worked out beforehand.
constexpr int kWalks = 4;
struct ProductPlan {
  ProductOperands of;
  int depth_channels, padded_channels, columns, result_width, result_pixels;
  Walk walks[kWalks];
};

// A place along the depth.
struct Depth {
  int j, i, c;  // tap (j, i) of the walk; channel

  // `channels` are a tap's, padded. Returns whether the tap changed.
  __device__ __forceinline__ bool settle(int channels, int taps_x) {
    bool moved = false;
    while (c >= channels) {
      c -= channels;
      if (++i == taps_x) {
        i = 0;
        ++j;
      }
      moved = true;
    }
    return moved;
  }
};

// ---- shared memory ---------------------------------------------------------------------------------------------------------
// Chunks of 16 bytes, so placed that neither the copies nor ldmatrix meet the same banks.
// Rows of 64 bytes, two to a line of 128: chunk position of (row, chunk).
__device__ __forceinline__ int depth_chunk(int row, int chunk) { return row * kStepChunks + (chunk ^ (row >> 1 & 3)); }
// Rows of at least 128 bytes: the transposed product's weights, a row for each step of the depth. 4-byte elements are read one by
// one, four rows at a time, the others through ldmatrix, eight rows at a time.
template <typename T> __device__ __forceinline__ int column_chunk(int row, int chunk, int chunks_a_row) {
  return row * chunks_a_row + (sizeof(T) == 4 ? chunk ^ ((row & 3) << 1) : chunk ^ (row & 7));
}

// One chunk from global to shared memory: 16 bytes on their way (kWide), or elements one by one, with zeros for those that are
// not there (`count` are).
template <typename T, bool kWide>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int count) {
  if constexpr (kWide) {
    cp_async16(to, from, count > 0);  // which does not look at `from` where nothing is read
  } else {
    Acc<T> x[kVec<T>];
    FISNET_UNROLL
    for (int i = 0; i < kVec<T>; ++i) x[i] = i < count ? to_acc(from[i]) : Acc<T>(0);
    store_shared<T, kVec<T>>(to, x);
  }
}

// Rows of A, a row for each position; a thread copies chunk threadIdx.x % 4 of every kPass-th row.
template <typename T, typename Tile, typename Product, bool kWide> class RowLoader {
 public:
  static constexpr int kPass = Tile::kThreads / kStepChunks, kRows = Tile::kM / kPass;

  __device__ __forceinline__ RowLoader(const Walk& walk, int m0) {
    const int first = static_cast<int>(threadIdx.x) / kStepChunks, plane = walk.y.rows * walk.x.rows;
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int m = m0 + first + i * kPass;
      const int sample = m / plane, at = m - sample * plane, row = at / walk.x.rows, column = at - row * walk.x.rows;
      y_[i] = m < walk.rows ? row * walk.y.step + walk.y.first : kNowhere;
      x_[i] = column * walk.x.step + walk.x.first;
      origin_[i] = sample * walk.y.size * walk.x.size;
    }
  }
  // Points the rows at a tap.
  __device__ __forceinline__ void seek(const Walk& walk, const Depth& d) {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int y = y_[i] + d.j * walk.y.tap_step, x = x_[i] + d.i * walk.x.tap_step;
      const bool there = d.j < walk.y.taps && y >= 0 && y < walk.y.size && x >= 0 && x < walk.x.size;
      at_[i] = there ? origin_[i] + y * walk.x.size + x : -1;
    }
  }
  // Channels that are left at the row's place, none outside of the map; its element.
  __device__ __forceinline__ int count(int i, int channels, const Depth& d) const { return at_[i] >= 0 ? channels - d.c : 0; }
  __device__ __forceinline__ int64_t at(int i, int channels, const Depth& d) const { return static_cast<int64_t>(at_[i]) * channels + d.c; }
  static __device__ __forceinline__ int place(int i) {
    return depth_chunk(static_cast<int>(threadIdx.x) / kStepChunks + i * kPass, static_cast<int>(threadIdx.x) % kStepChunks) * kVec<T>;
  }
  __device__ __forceinline__ void copy(T* tile, const T* A, int channels, const Depth& d) const {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) copy_chunk<T, kWide>(tile + place(i), A + at(i, channels, d), count(i, channels, d));
  }

 private:
  static constexpr int kNowhere = -(1 << 30);  // above every map, whatever the tap
  int y_[kRows], x_[kRows], origin_[kRows], at_[kRows];  // all count positions; at_ is -1 outside of the map
};

// max(x, 0). NaN stays NaN, as in PyTorch.
__device__ __forceinline__ double rectified(double x) { return x < 0.0 ? 0.0 : x; }
__device__ __forceinline__ float rectified(float x) {
#if defined(FISNET_EMU)
  return x < 0.0f ? 0.0f : x;
#else
  asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(x));
  return x;
#endif
}

// The prologue's rows of A: they wait in registers while a step is multiplied, then relu(scale A + shift) goes to shared memory.
// All rows of a thread have the same channels. `scale` and `shift` sit on 16-byte boundaries when kWide.
template <typename T, typename Tile, typename Product, bool kWide> class PrologueRows {
 public:
  using Loader = RowLoader<T, Tile, Product, kWide>;
  static constexpr int kVector = kWide ? kVec<T> : 1, kParts = kVec<T> / kVector;

  __device__ __forceinline__ void fetch(const Loader& rows, const T* A, int channels, const Depth& d) {
    c_ = d.c;
    FISNET_UNROLL
    for (int i = 0; i < Loader::kRows; ++i) {
      count_[i] = rows.count(i, channels, d);
      FISNET_UNROLL
      for (int v = 0; v < kParts; ++v)
        if (v * kVector < count_[i]) raw_[i][v].fetch(A, rows.at(i, channels, d) + v * kVector);
    }
  }
  // Outside of the map a convolution reads zeros: the padding of what stands behind the ReLU.
  __device__ __forceinline__ void put(T* tile, const Acc<T>* scale, const Acc<T>* shift) const {
    Acc<T> times[kVec<T>], plus[kVec<T>];
    if constexpr (kWide) {
      neighbours(times, scale + c_);
      neighbours(plus, shift + c_);
    }
    FISNET_UNROLL
    for (int i = 0; i < Loader::kRows; ++i) {
      Acc<T> x[kVec<T>] = {};
      if (count_[i] > 0) {
        FISNET_UNROLL
        for (int e = 0; e < kVec<T>; ++e) {
          if constexpr (!kWide) {
            if (e >= count_[i]) continue;
            times[e] = __ldg(scale + c_ + e);
            plus[e] = __ldg(shift + c_ + e);
          }
          x[e] = rectified(raw_[i][e / kVector][e % kVector] * times[e] + plus[e]);
        }
      }
      store_shared<T, kVec<T>>(tile + Loader::place(i), x);
    }
  }

 private:
  Raw<T, kVector> raw_[Loader::kRows][kParts];
  int count_[Loader::kRows], c_;
};

// Weights of the forward product: a row for each output channel, its depth as A's.
template <typename T, typename Tile, bool kWide> class ForwardWeights {
 public:
  static constexpr int kPass = Tile::kThreads / kStepChunks, kRows = Tile::kN / kPass;

  __device__ __forceinline__ ForwardWeights(const LinearMap& l, int n0) : row_(static_cast<int>(threadIdx.x) / kStepChunks) {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int n = n0 + row_ + i * kPass;
      at_[i] = n < l.c_out ? n * l.kernel_y * l.kernel_x : -1;
    }
  }
  __device__ __forceinline__ void copy(T* tile, const T* W, const LinearMap& l, const Walk& walk, const Depth& d) const {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int count = at_[i] >= 0 && d.j < walk.y.taps ? l.c_in - d.c : 0;
      const T* const from = W + (at_[i] + d.j * l.kernel_x + d.i) * l.c_in + d.c;
      copy_chunk<T, kWide>(tile + depth_chunk(row_ + i * kPass, static_cast<int>(threadIdx.x) % kStepChunks) * kVec<T>, from, count);
    }
  }

 private:
  int row_, at_[kRows];  // counts taps of the weight, which has fewer than 2^31 elements
};

// Weights of the transposed product: a row for each step of the depth (tap, output channel), input channels along it.
template <typename T, typename Tile, bool kWide> class TransposedWeights {
 public:
  static constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T)), kAcross = Tile::kN / kVec<T>;
  static constexpr int kPass = Tile::kThreads / kAcross, kRows = kStep / kPass;
  static_assert(kPass * kRows == kStep && kAcross >= 8, "threads share the rows evenly, and a row fills the banks");

  __device__ __forceinline__ TransposedWeights(const LinearMap& l, const Walk& walk, int channels, int n0)
      : row_(static_cast<int>(threadIdx.x) / kAcross), chunk_(static_cast<int>(threadIdx.x) % kAcross), left_(l.c_in - n0 - chunk_ * kVec<T>) {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      depth_[i] = {0, 0, row_ + i * kPass};
      depth_[i].settle(channels, walk.x.taps);
      seek(i, l, walk);
    }
  }
  __device__ __forceinline__ void copy(T* tile, const T* W) const {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i)
      copy_chunk<T, kWide>(tile + column_chunk<T>(row_ + i * kPass, chunk_, kAcross) * kVec<T>, W + at_[i], depth_[i].c < end_[i] ? left_ : 0);
  }
  __device__ __forceinline__ void advance(const LinearMap& l, const Walk& walk, int channels) {
    FISNET_UNROLL
    for (int i = 0; i < kRows; ++i) {
      depth_[i].c += kStep;
      at_[i] += kStep * l.kernel_y * l.kernel_x * l.c_in;
      if (depth_[i].settle(channels, walk.x.taps)) seek(i, l, walk);
    }
  }

 private:
  __device__ __forceinline__ void seek(int i, const LinearMap& l, const Walk& walk) {
    const Depth& d = depth_[i];
    const int r = walk.y.tap_first + d.j * walk.y.tap_every, s = walk.x.tap_first + d.i * walk.x.tap_every;
    at_[i] = ((d.c * l.kernel_y + r) * l.kernel_x + s) * l.c_in + l.c_in - left_;
    end_[i] = d.j < walk.y.taps ? l.c_out : 0;
  }

  int row_, chunk_, left_;  // left_: columns from this thread's first one on
  Depth depth_[kRows];
  int at_[kRows], end_[kRows];  // element of W; output channels of the tap, none behind the last one
};

// ---- products ----------------------------------------------------------------------------------------------------------------
// max(sign w, 0) of a register of weights: `flip` has the sign bits to turn, `keep` is 0 for a channel whose sign is 0.
template <typename T> __device__ __forceinline__ uint32_t positive(uint32_t w, uint32_t flip, uint32_t keep) {
  return relu_bits<T>((w ^ flip) & keep);
}

template <typename T, int N> __device__ __forceinline__ void round_operands(uint32_t (&r)[N]) {
  if constexpr (sizeof(T) == 4) {
    FISNET_UNROLL
    for (int i = 0; i < N; ++i) r[i] = to_tf32(__uint_as_float(r[i]));
  }
}

// The signs of this lane's columns, a value a mma tile: ForwardDual's; for others all +1, known at compile time.
template <typename T, typename Tile, typename Product> struct Signs {
  static constexpr bool kGiven = Product::kOperands == 1 && Product::kProducts == 2;
  uint32_t flip[Tile::kNT], keep[Tile::kNT];

  __device__ __forceinline__ Signs(const Acc<T>* sign, int n, int columns) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    FISNET_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      const int column = n + 8 * j + (lane >> 2);
      const Acc<T> value = kGiven && sign && column < columns ? sign[column] : Acc<T>(1);
      flip[j] = value < Acc<T>(0) ? (sizeof(T) == 2 ? 0x80008000u : 0x80000000u) : 0u;
      keep[j] = value == Acc<T>(0) ? 0u : 0xffffffffu;
    }
  }
};

// Where this lane reads its warp's part of the tile, which starts at row wm and column wn of it; worked out once. Offsets in
// elements: what a step, a half of it, and an mma tile add to them is known at compile time.
template <typename T, typename Tile, typename Product> class Fragments {
 public:
  static constexpr int kMT = Tile::kMT, kNT = Tile::kNT, kAcross = Tile::kN / kVec<T>;  // chunks of a row of transposed weights

  __device__ __forceinline__ Fragments(int wm, int wn) {
    const int lane = static_cast<int>(threadIdx.x) & 31;
    FISNET_UNROLL
    for (int half = 0; half < 2; ++half) {
      a_[half] = depth_chunk(wm + (lane & 15), 2 * half + (lane >> 4)) * kVec<T>;
      if constexpr (!Product::kTransposed) b_[half] = depth_chunk(wn + (lane & 7) + (lane >> 4 << 3), 2 * half + (lane >> 3 & 1)) * kVec<T>;
    }
    if constexpr (Product::kTransposed) {
      FISNET_UNROLL
      for (int v = 0; v < kVariants; ++v) {
        if constexpr (sizeof(T) == 2) b_[v] = column_chunk<T>(lane & 15, wn / 8 + 2 * v + (lane >> 4), kAcross) * kVec<T>;
        else b_[v] = column_chunk<T>(lane & 3, wn / 4 + 2 * v + (lane >> 4), kAcross) * kVec<T> + (lane >> 2 & 3);
      }
    }
  }

  // Half a step is 32 bytes of the depth: one mma.
  __device__ __forceinline__ void load_a(uint32_t (&a)[kMT][4], const T* A, int half) const {
    FISNET_UNROLL
    for (int i = 0; i < kMT; ++i) {
      ldmatrix_x4(a[i], A + a_[half] + i * 16 * kStepChunks * kVec<T>);
      round_operands<T>(a[i]);
    }
  }
  __device__ __forceinline__ void load_b(uint32_t (&b)[kNT][2], const T* B, int half) const {
    if constexpr (Product::kTransposed && sizeof(T) == 4) {
      FISNET_UNROLL
      for (int j = 0; j < kNT; ++j) {
        FISNET_UNROLL
        for (int i = 0; i < 2; ++i) b[j][i] = lds32(B + b_[j] + (8 * half + 4 * i) * kAcross * kVec<T>);
      }
    } else {
      FISNET_UNROLL
      for (int j = 0; j < kNT; j += 2) {
        uint32_t t[4];
        if constexpr (Product::kTransposed) ldmatrix_x4_trans(t, B + b_[j / 2] + 16 * half * kAcross * kVec<T>);
        else ldmatrix_x4(t, B + b_[half] + 8 * j * kStepChunks * kVec<T>);
        b[j][0] = t[0]; b[j][1] = t[1]; b[j + 1][0] = t[2]; b[j + 1][1] = t[3];
      }
    }
    FISNET_UNROLL
    for (int j = 0; j < kNT; ++j) round_operands<T>(b[j]);
  }

 private:
  // Pairs of columns whose places the swizzle turns differently.
  static constexpr int kVariants = !Product::kTransposed ? 2 : sizeof(T) == 2 ? kNT / 2 : kNT;
  int a_[2], b_[kVariants];
};

// acc += one step of the depth.
template <typename T, typename Tile, typename Product>
__device__ __forceinline__ void multiply_step(
    float (&acc)[Product::kProducts][Tile::kMT][Tile::kNT][4], const T* A, const T* B, const Fragments<T, Tile, Product>& fragments, const Signs<T, Tile, Product>& signs) {
  FISNET_UNROLL
  for (int half = 0; half < 2; ++half) {
    uint32_t b[Tile::kNT][2];
    fragments.load_b(b, B, half);
    FISNET_UNROLL
    for (int operand = 0; operand < Product::kOperands; ++operand) {
      uint32_t a[Tile::kMT][4];
      fragments.load_a(a, A + operand * Tile::kM * kStepChunks * kVec<T>, half);
      if (operand == 0) mma_tiles<T>(acc[0], a, b);
      if constexpr (Product::kProducts == 2) {
        if (operand == Product::kOperands - 1) {
          uint32_t plus[Tile::kNT][2];
          FISNET_UNROLL
          for (int j = 0; j < Tile::kNT; ++j) {
            FISNET_UNROLL
            for (int i = 0; i < 2; ++i) plus[j][i] = positive<T>(b[j][i], signs.flip[j], signs.keep[j]);
          }
          mma_tiles<T>(acc[1], a, plus);
        }
      }
    }
  }
}

// In float64, without tensor cores: a lane makes the elements that it would hold of an mma.
template <typename Tile, typename Product> class Fragments<double, Tile, Product> {
 public:
  __device__ __forceinline__ Fragments(int row, int column) : wm(row), wn(column) {}
  const int wm, wn;
};
template <typename T, typename Tile, typename Product>
__device__ __forceinline__ void multiply_step(
    double (&acc)[Product::kProducts][Tile::kMT][Tile::kNT][4], const T* A, const T* B, const Fragments<T, Tile, Product>& fragments, const Signs<T, Tile, Product>& signs) {
  constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T)), V = kVec<T>;
  const int lane = static_cast<int>(threadIdx.x) & 31;
  for (int k = 0; k < kStep; ++k) {
    FISNET_UNROLL
    for (int j = 0; j < Tile::kNT; ++j) {
      double b[2], plus[2];
      FISNET_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int n = fragments.wn + 8 * j + 2 * (lane & 3) + e;
        b[e] = Product::kTransposed ? B[column_chunk<T>(k, n / V, Tile::kN / V) * V + n % V] : B[depth_chunk(n, k / V) * V + k % V];
        // a lane holds the sign of column lane / 4 of each mma tile
        const uint32_t flip = __shfl_sync(0xffffffffu, signs.flip[j], (2 * (lane & 3) + e) * 4), keep = __shfl_sync(0xffffffffu, signs.keep[j], (2 * (lane & 3) + e) * 4);
        const double turned = flip ? -b[e] : b[e];
        plus[e] = keep && !(turned < 0) ? turned : 0.0;
      }
      FISNET_UNROLL
      for (int i = 0; i < Tile::kMT; ++i) {
        FISNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int row = fragments.wm + 16 * i + 8 * half + (lane >> 2);
          const double a = A[depth_chunk(row, k / V) * V + k % V];
          const double last = Product::kOperands == 2 ? A[(Tile::kM * kStepChunks + depth_chunk(row, k / V)) * V + k % V] : a;
          FISNET_UNROLL
          for (int e = 0; e < 2; ++e) {
            acc[0][i][j][2 * half + e] += a * b[e];
            if constexpr (Product::kProducts == 2) acc[1][i][j][2 * half + e] += last * plus[e];
          }
        }
      }
    }
  }
}

// ---- epilogues -------------------------------------------------------------------------------------------------------------
// An epilogue turns products into results. It is a struct of plain data with
//
//   static constexpr int kSums                   column sums over all rows that it wants (0 or 1)
//   template <int W> struct Fetched               what it reads for W neighbouring columns of one row
//   fetch<W>(const Place&) -> Fetched<W>          ... which is under way while the products change hands
//   finish<W>(fetched, place, v, sum)             v[product][i] are the products; writes the results, adds to sum[i]
//
// W is 1 or a vector of 16 bytes.
struct Place {
  int64_t at;    // element of the result, and of all that has its shape
  int64_t act;   // element of the activation beside it (K maps share one)
  int row;       // position of the result
  int sample;    // of the activation
  int column;    // channel
};

// A lane's neighbours in a mma fragment.
template <typename A> struct alignas(2 * sizeof(A)) Two { A first, second; };

// W neighbouring per-channel values of `from`, or `otherwise` where it is null. `from` sits on a 16-byte boundary when W > 1: it
// belongs among the pointers that `wide` is asked about.
template <int W, typename A> __device__ __forceinline__ void columns_of(A (&out)[W], const A* __restrict__ from, int column, A otherwise) {
  if (from) {
    neighbours(out, from + column);
  } else {
    FISNET_UNROLL
    for (int i = 0; i < W; ++i) out[i] = otherwise;
  }
}

// D = the product of `p`, finished by `epilogue`.
// A block makes a Tile of rows and columns of one sub-problem: its warps kWarpM x 32 each, in mma fragments; then every warp
// lays 16 rows at a time out in shared memory, so that a lane finishes whole 16-byte vectors. Neighbouring blocks share rows of A.
// Column sums: partial[row tile][column], to be added in order. Shared memory: product_shared(). Deterministic.
// no 16-byte loads and stores in double: it verifies, in the smallest shape and element by element
template <typename T, typename Tile, int kWide, typename Product, typename Epilogue>
__global__ void __launch_bounds__(Tile::kThreads, std::is_same_v<T, double> ? 2 : Tile::kMinBlocks) linear_kernel(ProductPlan plan, Epilogue epilogue, void* partial) {
  using A = Acc<T>;
  constexpr int kStep = kStepBytes / static_cast<int>(sizeof(T)), V = kVec<T>;
  constexpr int kTileA = Tile::kM * kStepChunks * V, kTileB = Tile::kN * kStepChunks * V, kStage = Product::kOperands * kTileA + kTileB;
  FISNET_SHARED(int, rows_at, 3 * Tile::kM);  // of each row: its place in the result, in the activation, the sample
  FISNET_SHARED(int, kept, 1);                // n0, for the results: there is no register for it while products are made
  FISNET_DYN_SMEM(T, smem);
  const int tid = static_cast<int>(threadIdx.x), lane = tid & 31, warp = tid >> 5;
  const ProductOperands& p = plan.of;
  const Walk& walk = plan.walks[blockIdx.z];
  const int tiles_n = ceil_div(plan.columns, Tile::kN);
  const int tile_m = static_cast<int>(blockIdx.x) / tiles_n, m0 = tile_m * Tile::kM, n0 = (static_cast<int>(blockIdx.x) - tile_m * tiles_n) * Tile::kN;
  if (m0 >= walk.rows) return;  // a sub-problem with fewer rows than the largest

  for (int r = tid; r < Tile::kM; r += Tile::kThreads) {
    const int m = m0 + r, plane = walk.y.rows * walk.x.rows;
    const int sample = m / plane, at = m - sample * plane, y = at / walk.x.rows, x = at - y * walk.x.rows;
    const int inside = (y * walk.y.out_step + walk.y.out_first) * plan.result_width + x * walk.x.out_step + walk.x.out_first;
    rows_at[r] = m < walk.rows ? sample * plan.result_pixels + inside : -1;
    rows_at[Tile::kM + r] = sample / p.maps * plan.result_pixels + inside;
    rows_at[2 * Tile::kM + r] = sample / p.maps;
  }
  if (tid == 0) *kept = n0;

  // ---- products
  const int channels = plan.padded_channels, steps = walk.steps;
  const int wm = warp / Tile::kWarpsN * Tile::kWarpM, wn = warp % Tile::kWarpsN * kWarpN;
  const Fragments<T, Tile, Product> fragments(wm, wn);
  const Signs<T, Tile, Product> signs(static_cast<const A*>(p.sign), n0 + wn, plan.columns);
  A acc[Product::kProducts][Tile::kMT][Tile::kNT][4] = {};
  if (steps > 0) {
    using Rows = RowLoader<T, Tile, Product, kWide != 0>;
    using Weights = std::conditional_t<Product::kTransposed, TransposedWeights<T, Tile, kWide != 0>, ForwardWeights<T, Tile, kWide != 0>>;
    Rows rows(walk, m0);
    Depth depth{0, 0, tid % kStepChunks * V};
    depth.settle(channels, walk.x.taps);
    rows.seek(walk, depth);
    auto weights = [&] {
      if constexpr (Product::kTransposed) return Weights(p.map, walk, channels, n0);
      else return Weights(p.map, n0);
    }();
    constexpr int kAheadStages = Tile::kStages - 1;
    PrologueRows<T, Tile, Product, kWide != 0> waiting[Product::kPrologue ? kAheadStages : 1];  // all of them before the first step, then [0]

    const auto load_stage = [&](int stage, int slot) {
      T* const to = smem + stage * kStage;
      if constexpr (Product::kPrologue) {
        waiting[slot].fetch(rows, static_cast<const T*>(p.A), plan.depth_channels, depth);
      } else {
        rows.copy(to, static_cast<const T*>(p.A), plan.depth_channels, depth);
        if constexpr (Product::kOperands == 2) rows.copy(to + kTileA, static_cast<const T*>(p.A_plus), plan.depth_channels, depth);
      }
      T* const to_weights = to + Product::kOperands * kTileA;
      if constexpr (Product::kTransposed) {
        weights.copy(to_weights, static_cast<const T*>(p.W));
        weights.advance(p.map, walk, channels);
      } else {
        weights.copy(to_weights, static_cast<const T*>(p.W), p.map, walk, depth);
      }
      depth.c += kStep;
      if (depth.settle(channels, walk.x.taps)) rows.seek(walk, depth);
    };
    const auto settle_stage = [&](int stage, int slot) {
      if constexpr (Product::kPrologue) waiting[slot].put(smem + stage * kStage, static_cast<const A*>(p.pre_scale), static_cast<const A*>(p.pre_shift));
    };

    FISNET_UNROLL
    for (int stage = 0; stage < kAheadStages; ++stage) {
      if (stage < steps) load_stage(stage, stage);
      cp_async_commit();
    }
    FISNET_UNROLL
    for (int stage = 0; stage < kAheadStages; ++stage) {
      if (stage < steps) settle_stage(stage, stage);
    }
    int reads = 0, writes = kAheadStages;  // stages
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<Tile::kStages - 2>();
      __syncthreads();  // all see this step, and nobody reads the one before any more, whose place is filled now
      const bool more = step + kAheadStages < steps;
      if (more) load_stage(writes, 0);
      cp_async_commit();
      const T* const stage = smem + reads * kStage;
      multiply_step<T, Tile, Product>(acc, stage, stage + Product::kOperands * kTileA, fragments, signs);
      if (more) settle_stage(writes, 0);
      reads = reads + 1 == Tile::kStages ? 0 : reads + 1;
      writes = writes + 1 == Tile::kStages ? 0 : writes + 1;
    }
    cp_async_wait<0>();
  }
  __syncthreads();  // the stages are free, and rows_at is there

  // ---- results
  constexpr int W = kWide ? V : 1, kAcross = kWarpN / W, kVectors = 16 * kAcross / 32, kAhead = kVectors < 2 ? kVectors : 2;
  static_assert(32 % kAcross == 0, "a lane keeps to its columns");
  A* const slab = reinterpret_cast<A*>(smem) + warp * Product::kProducts * 16 * kStagePitch;
  const int first_column = *kept, column = first_column + wn + lane % kAcross * W;
  A sum[W] = {};
  FISNET_UNROLL
  for (int i = 0; i < Tile::kMT; ++i) {
    FISNET_UNROLL
    for (int product = 0; product < Product::kProducts; ++product) {
      FISNET_UNROLL
      for (int j = 0; j < Tile::kNT; ++j) {
        FISNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          A* const to = slab + (product * 16 + 8 * half + (lane >> 2)) * kStagePitch + 8 * j + 2 * (lane & 3);
          *reinterpret_cast<Two<A>*>(to) = {acc[product][i][j][2 * half], acc[product][i][j][2 * half + 1]};
        }
      }
    }
    __syncwarp();
    for (int first = 0; first < kVectors; first += kAhead) {
      Place place[kAhead];
      typename Epilogue::template Fetched<W> fetched[kAhead];
      bool there[kAhead];
      FISNET_UNROLL
      for (int v = 0; v < kAhead; ++v) {
        const int r = wm + 16 * i + (lane + 32 * (first + v)) / kAcross, row = rows_at[r];
        there[v] = row >= 0 && column < plan.columns;
        place[v] = {static_cast<int64_t>(row) * plan.columns + column, static_cast<int64_t>(rows_at[Tile::kM + r]) * plan.columns + column, row, rows_at[2 * Tile::kM + r], column};
        if (there[v]) fetched[v] = epilogue.template fetch<W>(place[v]);
      }
      FISNET_UNROLL
      for (int v = 0; v < kAhead; ++v) {
        A values[Product::kProducts][W];
        const A* const from = slab + (lane + 32 * (first + v)) / kAcross * kStagePitch + lane % kAcross * W;
        FISNET_UNROLL
        for (int product = 0; product < Product::kProducts; ++product) {
          neighbours(values[product], from + product * 16 * kStagePitch);
        }
        if (there[v]) epilogue.template finish<W>(fetched[v], place[v], values, sum);
      }
    }
    __syncwarp();
  }

  if constexpr (Epilogue::kSums) {
    if (!partial) return;
    FISNET_UNROLL
    for (int by = kAcross; by < 32; by *= 2) {
      FISNET_UNROLL
      for (int w = 0; w < W; ++w) sum[w] += __shfl_xor_sync(0xffffffffu, sum[w], by);
    }
    __syncthreads();  // the slabs are free
    A* const sums = reinterpret_cast<A*>(smem);
    if (lane < kAcross) {
      FISNET_UNROLL
      for (int w = 0; w < W; ++w) sums[warp / Tile::kWarpsN * Tile::kN + wn + lane * W + w] = sum[w];
    }
    __syncthreads();
    for (int c = tid; c < Tile::kN && first_column + c < plan.columns; c += Tile::kThreads) {
      A total = 0;
      for (int w = 0; w < Tile::kWarpsM; ++w) total += sums[w * Tile::kN + c];
      static_cast<A*>(partial)[static_cast<int64_t>(tile_m) * plan.columns + first_column + c] = total;
    }
  }
}

// ---- at launch -----------------------------------------------------------------------------------------------------------------
// Tiles of rows in the largest sub-problem; with column sums, how many partial sums there are.
inline int row_tiles(const LinearMap& l, bool transposed, int tile_rows) { return ceil_div(Walk(l, transposed, 0, 1).rows, tile_rows); }

template <typename T, typename Tile, int kWide, typename Product, typename Epilogue>
int launch_linear(const ProductOperands& p, const Epilogue& epilogue, void* partial, cudaStream_t stream) {
  constexpr bool kTransposed = Product::kTransposed;
  const LinearMap& l = p.map;
  ProductPlan plan{};
  plan.of = p;
  plan.depth_channels = kTransposed ? l.c_out : l.c_in;
  plan.padded_channels = ceil_div(plan.depth_channels, kVec<T>) * kVec<T>;
  plan.columns = kTransposed ? l.c_in : l.c_out;
  plan.result_width = kTransposed ? l.width : l.out_width;
  plan.result_pixels = plan.result_width * (kTransposed ? l.height : l.out_height);
  const int64_t blocks = static_cast<int64_t>(row_tiles(l, kTransposed, Tile::kM)) * ceil_div(plan.columns, Tile::kN);
  if (blocks == 0) return 0;
  if (blocks > 0x7fffffff) return static_cast<int>(cudaErrorInvalidValue);
  const int problems = kTransposed ? l.stride_y * l.stride_x : 1;
  for (int first = 0; first < problems; first += kWalks) {
    const int count = std::min(kWalks, problems - first);
    for (int i = 0; i < count; ++i) plan.walks[i] = Walk(l, kTransposed, first + i, kVec<T>);
    const dim3 grid(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(count));
    const cudaError_t error = launch(linear_kernel<T, Tile, kWide, Product, Epilogue>, grid, dim3(Tile::kThreads), product_shared<T, Tile, Product>(), stream, plan, epilogue, partial);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  return 0;
}

// Whether whole 16-byte chunks of channels lie on 16-byte boundaries.
template <typename T, typename... P> bool wide(const LinearMap& l, const P*... pointers) {
  return l.c_in % kVec<T> == 0 && l.c_out % kVec<T> == 0 && aligned16(pointers...);
}
}  // namespace fisnet
