// The z^B rule as two implicit matrix products, forward and adjoint: tensor cores for 2-byte types, fused multiply-adds in
// the same tiling for float and double. See zb.h for the operands and kernels' comments for the tiling.
#include "zb.h"

#include "../device/divide.cuh"

namespace fisnet {
namespace {
constexpr int kThreads = 256;
constexpr int kMaxTaps = 49;
constexpr int kAhead = 2;  // vectors that a thread loads before it computes, where maps are read

// ---- warp products -----------------------------------------------------------------------------------------------------
// Every product leaves fragments of mma.m16n8k16: a lane holds rows lane/4 and lane/4 + 8, columns 2 (lane % 4) and the next.

// d[m][n] += A_m B_n^T over kHalves halves of 8 steps. Row r of A_m starts at a[m] + r * a_pitch + at[half], column n of B at
// b + n * b_pitch + 8 half.
template <typename T, int MT, int NT, int kHalves>
__device__ __forceinline__ void multiply(Acc<T> (&d)[MT][NT][4], const T* const (&a)[MT], int a_pitch, int at0, int at1, const T* b, int b_pitch) {
  const int lane = static_cast<int>(threadIdx.x) & 31;
  if constexpr (sizeof(T) == 2) {
    uint32_t rows[MT][4];
    const int mine = (lane & 15) * a_pitch + (lane < 16 ? at0 : at1);
    FISNET_UNROLL
    for (int m = 0; m < MT; ++m) ldmatrix_x4(rows[m], a[m] + mine);
    b += (lane >> 2) * b_pitch + 2 * (lane & 3);
    FISNET_UNROLL
    for (int n = 0; n < NT; ++n) {
      const T* const column = b + n * 8 * b_pitch;
      const uint32_t columns[2] = {*reinterpret_cast<const uint32_t*>(column), *reinterpret_cast<const uint32_t*>(column + 8)};
      FISNET_UNROLL
      for (int m = 0; m < MT; ++m) MmaK16<T>::run(d[m][n], rows[m], columns);
    }
  } else {
    constexpr int V = kVec<T>;
    const int row = (lane >> 2) * a_pitch;
    b += 2 * (lane & 3) * b_pitch;
    for (int step = 0; step < 8 * kHalves; step += V) {
      const int at = step < 8 ? at0 + step : at1 + step - 8;
      Acc<T> top[MT][V], bottom[MT][V];
      FISNET_UNROLL
      for (int m = 0; m < MT; ++m) {
        load<T, V>(top[m], a[m] + row + at);
        load<T, V>(bottom[m], a[m] + row + 8 * a_pitch + at);
      }
      FISNET_UNROLL
      for (int n = 0; n < NT; ++n) {
        Acc<T> left[V], right[V];
        load<T, V>(left, b + n * 8 * b_pitch + step);
        load<T, V>(right, b + (n * 8 + 1) * b_pitch + step);
        FISNET_UNROLL
        for (int m = 0; m < MT; ++m) {
          FISNET_UNROLL
          for (int i = 0; i < V; ++i) {
            d[m][n][0] += top[m][i] * left[i];
            d[m][n][1] += top[m][i] * right[i];
            d[m][n][2] += bottom[m][i] * left[i];
            d[m][n][3] += bottom[m][i] * right[i];
          }
        }
      }
    }
  }
}

// ---- tiles of the layer's output -----------------------------------------------------------------------------------------
// A divisor of numbers below 2^15: exact, because the rounding of the product is far smaller than the half that is added, and
// a few instructions where an integer division is a routine.
struct Small {
  int value;
  float inverse;
  explicit __host__ __device__ Small(int v) : value(v), inverse(1.0f / static_cast<float>(v)) {}
  __device__ __forceinline__ operator int() const { return value; }
};
__device__ __forceinline__ int quotient(int i, Small by) { return static_cast<int>((static_cast<float>(i) + 0.5f) * by.inverse); }
__device__ __forceinline__ int quotient(int i, int by) { return i / by; }

// W channels at one position of a tile. `at` is the offset inside a sample; `slot` numbers the tile's positions row by row.
struct Item {
  int slot, c, y, x, at;
  bool inside;
};
template <int W, int kChannels, typename Count>
__device__ __forceinline__ Item item_of(const ZbLayer& l, int i, int y0, int x0, Count positions, Count columns, int c0) {
  Item item;
  const bool last = W > 1 || l.channels_last;
  if (last) {
    item.slot = i / (kChannels / W);
    item.c = i % (kChannels / W) * W;
  } else {  // neighbouring threads take neighbouring positions
    item.c = quotient(i, positions);
    item.slot = i - item.c * positions;
  }
  const int row = quotient(item.slot, columns);
  item.y = y0 + row;
  item.x = x0 + item.slot - row * columns;
  const int o = c0 + item.c;
  item.inside = item.y >= 0 && item.y < l.out_height && item.x >= 0 && item.x < l.out_width && o < l.c_out;
  item.at = last ? (item.y * l.out_width + item.x) * l.c_out + o : (o * l.out_height + item.y) * l.out_width + item.x;
  return item;
}

// Which of the layer's windows a position has: those at the edges are numbered one by one, all others are alike.
__device__ __forceinline__ int class_of(const ZbLayer& l, int y, int size) {
  const int edge = l.edge();
  return y < edge ? y : y >= size - edge ? l.classes(size) - (size - y) : edge;
}

// den = z' + e sign z' with z' = z - box, and z itself.
template <typename T, int W>
__device__ __forceinline__ void load_denominators(Acc<T> (&z)[W], Acc<T> (&den)[W], const T* sample, const Acc<T>* boxes, const ZbLayer& l, const Item& item, int o, Acc<T> eps) {
  using A = Acc<T>;
  load<T, W>(z, sample + item.at);
  boxes += (class_of(l, item.y, l.out_height) * l.classes(l.out_width) + class_of(l, item.x, l.out_width)) * l.c_out + o;
  A box[W];
  if constexpr (W == 1) {
    box[0] = *boxes;
  } else {
    FISNET_UNROLL
    for (int i = 0; i < W; i += kVec<A>) {
      A part[kVec<A>];
      load<A, kVec<A>>(part, boxes + i);
      FISNET_UNROLL
      for (int j = 0; j < kVec<A>; ++j) box[i + j] = part[j];
    }
  }
  FISNET_UNROLL
  for (int i = 0; i < W; ++i) {
    A v = z[i] - box[i];
    v += v < A(0) ? -eps : eps;  // sign 0 = +1
    den[i] = v == A(0) ? A(1) : v;  // 0 / 0 reads 0
  }
}

// ---- preparation -----------------------------------------------------------------------------------------------------------
// box[y class][x class][o] = sum over the window's taps inside the image of (W+ l + W- h) + b+ min l + b- max h.
// In double: z' is a small difference of z and this.
template <typename T>
__device__ __forceinline__ Acc<T> box_of(const ZbLayer& l, const T* W, const Acc<T>* shift, const Acc<T>* low, const Acc<T>* high, int i) {
  using A = Acc<T>;
  const int o = i % l.c_out, nx = l.classes(l.out_width), ny = l.classes(l.out_height);
  const int xc = i / l.c_out % nx, yc = i / l.c_out / nx;
  const int y = yc <= l.edge() ? yc : l.out_height - (ny - yc), x = xc <= l.edge() ? xc : l.out_width - (nx - xc);
  double sum = 0;
  A least = low[0], most = high[0];
  for (int c = 0; c < l.c_in; ++c) {
    least = low[c] < least ? low[c] : least;
    most = high[c] > most ? high[c] : most;
    for (int ky = 0; ky < l.kernel; ++ky) {
      const int iy = y * l.stride - l.padding + ky;
      if (iy < 0 || iy >= l.height) continue;
      for (int kx = 0; kx < l.kernel; ++kx) {
        const int ix = x * l.stride - l.padding + kx;
        if (ix < 0 || ix >= l.width) continue;
        const A w = to_acc(W[((o * l.c_in + c) * l.kernel + ky) * l.kernel + kx]);
        sum += static_cast<double>(w) * (w > A(0) ? low[c] : high[c]);
      }
    }
  }
  if (shift) sum += static_cast<double>(shift[o]) * (shift[o] > A(0) ? least : most);
  return static_cast<A>(sum);
}

// W+ for sign 0, W- for sign 1; 0 outside the kernel.
template <typename T>
__device__ __forceinline__ T signed_weight(const ZbLayer& l, const T* W, int o, int c, int ky, int kx, int sign) {
  using A = Acc<T>;
  if (o >= l.c_out || c >= l.c_in || ky >= l.kernel || kx >= l.kernel) return from_acc<T>(A(0));
  const A w = to_acc(W[((o * l.c_in + c) * l.kernel + ky) * l.kernel + kx]);
  return from_acc<T>((w > A(0)) == (sign == 0) ? w : A(0));
}

// Lays W+ and W- out as the second operand of the products, and makes the table of boxes. One thread an element.
// no 16-byte loads and stores: rearranges a few kilobytes of weights once
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) zb_pack_kernel(ZbParams p, int packed, int boxes) {
  const ZbLayer& l = p.layer;
  const T* const W = static_cast<const T*>(p.W);
  for (int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); i < packed + boxes; i += static_cast<int>(gridDim.x) * kThreads) {
    if (i >= packed) {
      static_cast<Acc<T>*>(p.box)[i - packed] = box_of<T>(l, W, static_cast<const Acc<T>*>(p.shift), static_cast<const Acc<T>*>(p.low), static_cast<const Acc<T>*>(p.high), i - packed);
      continue;
    }
    constexpr int kChunk = zb_chunk(sizeof(T));
    const int taps = l.phase_taps(), columns = (l.phases() * l.c_in * 2 + 7) / 8 * 8;
    const int n = i / kChunk % columns, tap = i / kChunk / columns % (taps * taps);
    const int o = i / kChunk / columns / (taps * taps) * kChunk + i % kChunk;
    const int phase = n / 2 / l.c_in, c = n / 2 - phase * l.c_in;
    const int ky = phase / l.stride + l.stride * (tap / taps), kx = phase % l.stride + l.stride * (tap % taps);
    static_cast<T*>(p.packed)[i] = signed_weight<T>(l, W, o, phase < l.phases() ? c : l.c_in, ky, kx, n & 1);
  }
}

// no 16-byte loads and stores: rearranges a few kilobytes of weights once
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) zb_pack_backward_kernel(ZbBackwardParams p, int packed, int boxes) {
  const ZbLayer& l = p.layer;
  const T* const W = static_cast<const T*>(p.W);
  for (int i = static_cast<int>(blockIdx.x) * kThreads + static_cast<int>(threadIdx.x); i < packed + boxes; i += static_cast<int>(gridDim.x) * kThreads) {
    if (i >= packed) {
      static_cast<Acc<T>*>(p.box)[i - packed] = box_of<T>(l, W, static_cast<const Acc<T>*>(p.shift), static_cast<const Acc<T>*>(p.low), static_cast<const Acc<T>*>(p.high), i - packed);
      continue;
    }
    const int depth = zb_depth(l), k = i % depth, tap = k / 8;
    static_cast<T*>(p.packed)[i] = signed_weight<T>(l, W, i / depth, k % 8 / 2, tap / l.kernel, tap % l.kernel, k & 1);
  }
}

// ---- forward -----------------------------------------------------------------------------------------------------------------
// Tile of the forward: `kRows` x `kColumns` positions q, each the stride^2 inputs i + padding = stride q + phase.
template <int MT> struct ForwardTile {
  static constexpr int kRows = MT == 1 ? 8 : 16, kColumns = MT == 4 ? 32 : 16;
};

// R = (x - l) c+ + (x - h) c-,  c+- = W+-^T s,  s = R_out / (z' + e sign z')  (R_out times carrier, where there is one).
//
// As a matrix product: rows are positions q (above), columns (phase, channel, sign), and the sum runs over the taps j of a phase
// and over output channels: c[q, (phase, c, sign)] = sum_j sum_o s[q - j, o] W(sign)[o, c, phase + stride j]. No position is
// computed twice and no column is empty for three channels and stride 2 (24 columns), where the transposed convolution of a
// library pads 3 channels to 8 or 32.
// A block owns one tile of one map, a warp MT sixteenths of it; it goes through the output channels by chunks of 64 bytes. Shared
// memory: s of the tile and its halo in T, [position][channel], 80 bytes each (no bank conflicts for ldmatrix), and the
// chunk's weights. s is never written out: the backward makes it again from what it reads anyway.
// Accumulates in float32 (float64 for float64). Deterministic.
// no 16-byte stores: a lane ends with single values, of images with at most four channels
template <typename T, int W, int MT, int NT>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : 2) zb_kernel(ZbParams p) {
  using A = Acc<T>;
  using Tile = ForwardTile<MT>;
  constexpr int kChunk = zb_chunk(sizeof(T)), kPitch = kChunk + kVec<T>, kParts = kChunk / kVec<T>, kHalves = kChunk == 8 ? 1 : 2;
  const ZbLayer& l = p.layer;
  const int taps = l.phase_taps(), halo = taps - 1;
  const Small columns(Tile::kColumns + halo), positions((Tile::kRows + halo) * columns.value);
  FISNET_DYN_SMEM(unsigned char, memory);
  T* const s_tile = reinterpret_cast<T*>(memory);
  T* const weights = s_tile + positions.value * kPitch;

  const int first = l.padding / l.stride, last_y = (l.height - 1 + l.padding) / l.stride, last_x = (l.width - 1 + l.padding) / l.stride;
  const int across = (last_x - first) / Tile::kColumns + 1;
  const int qy0 = first + static_cast<int>(blockIdx.x) / across * Tile::kRows, qx0 = first + static_cast<int>(blockIdx.x) % across * Tile::kColumns;
  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = static_cast<int>(threadIdx.x) & 31;
  int row_of[MT], column_of[MT];
  FISNET_UNROLL
  for (int m = 0; m < MT; ++m) {
    row_of[m] = MT == 1 ? warp : 2 * warp + (m & 1);
    column_of[m] = 16 * (m >> 1);
  }
  const bool busy = qy0 + row_of[0] <= last_y;
  const int64_t out_size = static_cast<int64_t>(l.c_out) * l.out_height * l.out_width, in_size = static_cast<int64_t>(l.c_in) * l.height * l.width;
  const A eps = static_cast<A>(p.eps);

  for (int64_t map = blockIdx.y; map < l.samples * l.maps; map += gridDim.y) {
    const int64_t n = map / l.maps;
    const T* const g = static_cast<const T*>(p.R_out) + map * out_size;
    const T* const z = static_cast<const T*>(p.z) + n * out_size;
    const T* const carrier = p.carrier ? static_cast<const T*>(p.carrier) + n * out_size : nullptr;
    A sum[MT][NT][4] = {};
    for (int o0 = 0; o0 < l.c_out; o0 += kChunk) {
      __syncthreads();  // the chunk before is used up
      const int vectors = taps * taps * NT * 8 * kParts;
      const T* const from = static_cast<const T*>(p.packed) + static_cast<int64_t>(o0 / kChunk) * vectors * kVec<T>;
      for (int i = static_cast<int>(threadIdx.x); i < vectors; i += kThreads) cp_async16(weights + i / kParts * kPitch + i % kParts * kVec<T>, from + i * kVec<T>, true);
      cp_async_commit();
      const int count = positions.value * (kChunk / W);
      constexpr int kTogether = sizeof(T) == 2 && NT > 2 ? 1 : kAhead;  // beside more accumulators there are no registers for two
      for (int i = static_cast<int>(threadIdx.x); i < count; i += kTogether * kThreads) {
        Item item[kTogether];
        A value[kTogether][W], den[kTogether][W], s[kTogether][W] = {};
        FISNET_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          item[k] = item_of<W, kChunk>(l, i + k * kThreads, qy0 - halo, qx0 - halo, positions, columns, o0);
          if (i + k * kThreads >= count || !item[k].inside) continue;
          load_denominators<T, W>(value[k], den[k], z, static_cast<const A*>(p.box), l, item[k], o0 + item[k].c, eps);
          load<T, W>(s[k], g + item[k].at);
          if (carrier && carrier != z) load<T, W>(value[k], carrier + item[k].at);
        }
        FISNET_UNROLL
        for (int k = 0; k < kTogether; ++k) {
          if (i + k * kThreads >= count) continue;
          if (item[k].inside) {
            FISNET_UNROLL
            for (int j = 0; j < W; ++j) {
              const Divisor<A> over(den[k][j]);  // a carrier of activations is 0 at half of its places
              s[k][j] = carrier ? s[k][j] * over(value[k][j]) : over(s[k][j]);
            }
          }
          store_shared<T, W>(s_tile + item[k].slot * kPitch + item[k].c, s[k]);
        }
      }
      cp_async_wait<0>();
      __syncthreads();
      if (!busy) continue;
      for (int tap = 0; tap < taps * taps; ++tap) {
        const int jy = tap / taps, jx = tap - jy * taps;
        const T* rows[MT];
        FISNET_UNROLL
        for (int m = 0; m < MT; ++m) rows[m] = s_tile + ((row_of[m] + halo - jy) * columns.value + column_of[m] + halo - jx) * kPitch;
        FISNET_UNROLL
        for (int k = 0; k < kChunk; k += 16) multiply<T, MT, NT, kHalves>(sum, rows, kPitch, k, k + 8, weights + tap * NT * 8 * kPitch + k, kPitch);
      }
    }

    // columns 2 pair and 2 pair + 1 are c+ and c- of (phase, channel) = pair, and lie in one lane
    const T* const x = static_cast<const T*>(p.x) + n * in_size;
    T* const R = static_cast<T*>(p.R) + map * in_size;
    FISNET_UNROLL
    for (int t = 0; t < NT; ++t) {
      const int pair = 4 * t + (lane & 3), phase = pair / l.c_in, c = pair - phase * l.c_in;
      if (phase >= l.phases()) continue;
      const A low = static_cast<const A*>(p.low)[c], high = static_cast<const A*>(p.high)[c];
      const int phase_y = phase / l.stride, phase_x = phase - phase_y * l.stride;
      FISNET_UNROLL
      for (int m = 0; m < MT; ++m) {
        const int iy = (qy0 + row_of[m]) * l.stride + phase_y - l.padding;
        FISNET_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int ix = (qx0 + column_of[m] + (lane >> 2) + 8 * half) * l.stride + phase_x - l.padding;
          if (iy < 0 || iy >= l.height || ix < 0 || ix >= l.width) continue;
          const int64_t at = c * l.x_channel + (iy * l.width + ix) * l.x_pixel;
          const A value = to_acc(x[at]);
          R[at] = from_acc<T>((value - low) * sum[m][t][2 * half] + (value - high) * sum[m][t][2 * half + 1]);
        }
      }
    }
  }
}

// ---- images in shared memory ------------------------------------------------------------------------------------------------
// The inputs under a tile of output positions: 8 values a pixel. Columns of one phase lie together, so that the pixels a tap
// meets at neighbouring positions are neighbours: 16-byte pixels (of 2-byte types) without bank conflicts at every stride.
struct ImageTile {
  int rows, columns, half, pitch;

  __host__ __device__ ImageTile(const ZbLayer& l, int out_rows, int out_columns)
      : rows(l.stride * (out_rows - 1) + l.kernel), columns(l.stride * (out_columns - 1) + l.kernel),
        half((columns + l.stride - 1) / l.stride), pitch(half * l.stride) {}
  __host__ __device__ int slots() const { return rows * pitch; }
  // strides are 1 and 2: the remainder and the quotient are a mask and a shift
  __device__ __forceinline__ int slot(int stride, int row, int column) const { return row * pitch + (column & (stride - 1)) * half + (column >> (stride - 1)); }
};

// Fills c+ and c- of every pixel under the tile at (y0, x0), c+ = (x - l) R_bar and c- = (x - h) R_bar, interleaved by channel;
// with `plain` also (x0, x1, x2, x3, 1 inside the image, 1, 0, 0). Zeros outside the image.
template <typename T>
__device__ __forceinline__ void load_image(const ZbBackwardParams& p, const ImageTile& image, int64_t map, int y0, int x0, T* signed_to, T* plain) {
  using A = Acc<T>;
  const ZbLayer& l = p.layer;
  const int64_t in_size = static_cast<int64_t>(l.c_in) * l.height * l.width;
  const T* const x = static_cast<const T*>(p.x) + map / l.maps * in_size;
  const T* const R_bar = static_cast<const T*>(p.R_bar) + map * in_size;
  const Small columns(image.columns);
  for (int i = static_cast<int>(threadIdx.x); i < image.rows * image.columns; i += kThreads) {
    const int row = quotient(i, columns), column = i - row * image.columns;
    const int iy = y0 * l.stride - l.padding + row, ix = x0 * l.stride - l.padding + column;
    const bool inside = iy >= 0 && iy < l.height && ix >= 0 && ix < l.width;
    A both[8] = {}, own[8] = {};
    FISNET_UNROLL
    for (int c = 0; c < ZbLayer::kMaxIn; ++c) {
      if (c >= l.c_in || !inside) continue;
      const int64_t at = c * l.x_channel + (iy * l.width + ix) * l.x_pixel;
      const A value = to_acc(x[at]), bar = to_acc(R_bar[at]);
      both[2 * c] = (value - static_cast<const A*>(p.low)[c]) * bar;
      both[2 * c + 1] = (value - static_cast<const A*>(p.high)[c]) * bar;
      own[c] = value;
    }
    own[4] = inside ? 1 : 0;
    own[5] = 1;
    const int to = image.slot(l.stride, row, column) * 8;
    FISNET_UNROLL
    for (int j = 0; j < 8; j += kVec<T>) {
      A part[kVec<T>];
      FISNET_UNROLL
      for (int k = 0; k < kVec<T>; ++k) part[k] = both[j + k];
      store_shared<T, kVec<T>>(signed_to + to + j, part);
      if (!plain) continue;
      FISNET_UNROLL
      for (int k = 0; k < kVec<T>; ++k) part[k] = own[j + k];
      store_shared<T, kVec<T>>(plain + to + j, part);
    }
  }
}

// ---- adjoint -----------------------------------------------------------------------------------------------------------------
template <typename T> struct BackwardTile {
  static constexpr int MT = sizeof(T) == 8 ? 1 : 2;
  static constexpr int kRows = 8 * MT, kColumns = 16, kPositions = kRows * kColumns;
  static constexpr int kOut = zb_columns(sizeof(T)), kOutPitch = kOut + kVec<Acc<T>>;
  static constexpr int kProductBytes = static_cast<int>(sizeof(Acc<T>)) * kPositions * kOutPitch;
  static __host__ __device__ int bytes_before_sums(const ZbLayer& l) {
    const int size = static_cast<int>(sizeof(T)), weights = size * kOut * (zb_depth(l) + kVec<T>);
    return size * 8 * ImageTile(l, kRows, kColumns).slots() + (weights > kProductBytes ? weights : kProductBytes);
  }
  static size_t bytes(const ZbLayer& l) { return static_cast<size_t>(bytes_before_sums(l) + (sizeof(T) == 2 && l.maps > 1 ? kProductBytes : 0)); }
};

// s_bar = W+ c+ + W- c-,  u = s_bar / den;  R_out_bar = carrier u,  carrier_bar = sum_k g u   (without carrier: R_out_bar = u).
//
// As a matrix product: rows are output positions, columns output channels, and the sum runs over (tap, channel, sign), 8 a tap.
// A block owns a tile of 16 x 16 positions (8 x 16 for double) of one sample and goes through chunks of output channels and the
// K maps; a warp owns MT rows of 16 positions, and in the pointwise part a thread owns vectors of W channels, the same ones for
// every map. Shared memory: the image under the tile; the chunk's weights, which then give way to s_bar; and, for K > 1 and 2-byte
// types, the sum of carrier_bar over the maps (wider types add it up where it is written). Accumulates in float32 (float64 for
// float64). Deterministic.
// no 16-byte stores in double: its channels are taken one by one
template <typename T, int W>
__global__ void __launch_bounds__(kThreads, 2) zb_backward_kernel(ZbBackwardParams p) {
  using A = Acc<T>;
  using Tile = BackwardTile<T>;
  constexpr int MT = Tile::MT, NT = Tile::kOut / 8;
  constexpr bool kSumsApart = sizeof(T) == 2;
  const ZbLayer& l = p.layer;
  const ImageTile image(l, Tile::kRows, Tile::kColumns);
  const int depth = zb_depth(l), pitch = depth + kVec<T>, parts = depth / kVec<T>;
  FISNET_DYN_SMEM(unsigned char, memory);
  FISNET_SHARED(int, tap_at, kMaxTaps + 1);
  T* const pixels = reinterpret_cast<T*>(memory);
  T* const weights = pixels + image.slots() * 8;
  A* const s_bar = reinterpret_cast<A*>(weights);
  A* const over_maps = reinterpret_cast<A*>(memory + Tile::bytes_before_sums(l));

  const int tid = static_cast<int>(threadIdx.x), warp = tid >> 5, lane = tid & 31;
  for (int tap = tid; tap < depth / 8; tap += kThreads) tap_at[tap] = tap < l.taps() ? image.slot(l.stride, tap / l.kernel, tap % l.kernel) * 8 : 0;
  const int across = (l.out_width + Tile::kColumns - 1) / Tile::kColumns;
  const int y0 = static_cast<int>(blockIdx.x) / across * Tile::kRows, x0 = static_cast<int>(blockIdx.x) % across * Tile::kColumns;
  const T* rows[MT];
  FISNET_UNROLL
  for (int m = 0; m < MT; ++m) rows[m] = pixels + (warp * MT + m) * l.stride * image.pitch * 8;
  const int64_t out_size = static_cast<int64_t>(l.c_out) * l.out_height * l.out_width;
  const A eps = static_cast<A>(p.eps);

  for (int64_t n = blockIdx.y; n < l.samples; n += gridDim.y) {
    const T* const z = static_cast<const T*>(p.z) + n * out_size;
    const T* const carrier = p.carrier ? static_cast<const T*>(p.carrier) + n * out_size : nullptr;
    for (int o0 = 0; o0 < l.c_out; o0 += Tile::kOut) {
      for (int k = 0; k < l.maps; ++k) {
        const int64_t map = n * l.maps + k;
        __syncthreads();  // s_bar, and the map before, are used up
        const T* const from = static_cast<const T*>(p.packed) + static_cast<int64_t>(o0) * depth;
        for (int i = tid; i < Tile::kOut * parts; i += kThreads) {
          const int o = i / parts;
          cp_async16(weights + o * pitch + (i - o * parts) * kVec<T>, from + i * kVec<T>, true);
        }
        cp_async_commit();
        if (l.maps > 1 || o0 == 0) load_image<T>(p, image, map, y0, x0, pixels, nullptr);
        cp_async_wait<0>();
        __syncthreads();
        A sum[MT][NT][4] = {};
        if (y0 + warp * MT < l.out_height) {
          for (int j = 0; j < depth / 16; ++j) multiply<T, MT, NT, 2>(sum, rows, 8, tap_at[2 * j], tap_at[2 * j + 1], weights + 16 * j, pitch);
        }
        __syncthreads();  // the weights are used up
        FISNET_UNROLL
        for (int m = 0; m < MT; ++m) {
          A* const to = s_bar + ((warp * MT + m) * 16 + (lane >> 2)) * Tile::kOutPitch + 2 * (lane & 3);
          FISNET_UNROLL
          for (int t = 0; t < NT; ++t) {
            to[8 * t] = sum[m][t][0];
            to[8 * t + 1] = sum[m][t][1];
            to[8 * Tile::kOutPitch + 8 * t] = sum[m][t][2];
            to[8 * Tile::kOutPitch + 8 * t + 1] = sum[m][t][3];
          }
        }
        __syncthreads();
        for (int i = tid; i < Tile::kPositions * (Tile::kOut / W); i += kThreads) {
          const Item item = item_of<W, Tile::kOut>(l, i, y0, x0, Tile::kPositions, Tile::kColumns, o0);
          if (!item.inside) continue;
          const int mine = item.slot * Tile::kOutPitch + item.c;
          A value[W], u[W];
          load_denominators<T, W>(value, u, z, static_cast<const A*>(p.box), l, item, o0 + item.c, eps);
          FISNET_UNROLL
          for (int j = 0; j < W; ++j) u[j] = Divisor<A>(u[j])(s_bar[mine + j]);
          if (carrier) {
            A carrier_bar[W];
            load<T, W>(carrier_bar, static_cast<const T*>(p.R_out) + map * out_size + item.at);
            if (carrier != z) load<T, W>(value, carrier + item.at);
            T* const to = static_cast<T*>(p.carrier_bar) + n * out_size + item.at;
            A before[W] = {};
            if (k > 0) {
              if constexpr (kSumsApart) {
                FISNET_UNROLL
                for (int j = 0; j < W; ++j) before[j] = over_maps[mine + j];
              } else {
                load<T, W>(before, to);
              }
            }
            FISNET_UNROLL
            for (int j = 0; j < W; ++j) {
              carrier_bar[j] = carrier_bar[j] * u[j] + before[j];
              u[j] *= value[j];
              if (kSumsApart && k < l.maps - 1) over_maps[mine + j] = carrier_bar[j];
            }
            if (!kSumsApart || k == l.maps - 1) store<T, W>(to, carrier_bar);
          }
          store<T, W>(static_cast<T*>(p.R_out_bar) + map * out_size + item.at, u);
        }
      }
    }
  }
}

// ---- weight gradient -----------------------------------------------------------------------------------------------------------
template <typename T> struct WeightTile {
  static constexpr int kRows = sizeof(T) == 8 ? 4 : 8, kColumns = 16, kPositions = kRows * kColumns;
  static constexpr int kOut = zb_rows(sizeof(T)), kOutPitch = kOut + kVec<T>, MT = kOut / 16;
  static size_t bytes(const ZbLayer& l) {
    return sizeof(T) * (16 * static_cast<size_t>(ImageTile(l, kRows, kColumns).slots()) + 2 * kPositions * kOutPitch);
  }
};

// For every weight position (o, tap), the sums over samples, maps and output positions of
//   s (c+_0, c-_0, c+_1, c-_1, ...)  and  z_bar (x_0, x_1, x_2, x_3, [inside the image], 1, 0, 0),
// of which the finishing kernel makes W_bar and shift_bar. z_bar = -s u = -(g / den) R_out_bar, with or without carrier.
//
// As a matrix product: rows are output channels, columns 16 a tap, and the sum runs over positions. A block owns kOut output
// channels, all taps, and every gridDim.y-th tile of positions. Its 8 / kSplit groups of kSplit warps own every (8 / kSplit)-th tap,
// the warps of a group every kSplit-th row of the tiles, and keep the sums in registers from the first tile to the last. Shared memory, in T: s and z_bar of the tile, [position][channel], and the image under it.
// Each block and each part of the split leaves its sums in a slab of `partial`. Accumulates in float32 (float64 for float64). Deterministic.
// no 16-byte loads in double: the tiles of 8-byte elements are staged one by one
// no 16-byte stores: a block leaves its few sums once
template <typename T, int W, int kTaps, int kSplit>
__global__ void __launch_bounds__(kThreads, kTaps == 3 && sizeof(T) < 8 ? 2 : 1) zb_wgrad_kernel(ZbBackwardParams p) {
  using A = Acc<T>;
  using Tile = WeightTile<T>;
  constexpr int MT = Tile::MT, kPitch = Tile::kOutPitch, kGroups = 8 / kSplit;
  const ZbLayer& l = p.layer;
  const ImageTile image(l, Tile::kRows, Tile::kColumns);
  FISNET_DYN_SMEM(unsigned char, memory);
  T* const s_tile = reinterpret_cast<T*>(memory);
  T* const z_tile = s_tile + Tile::kPositions * kPitch;
  T* const planes = z_tile + Tile::kPositions * kPitch;  // c+-, then x
  const int plane = image.slots() * 8;

  const int tid = static_cast<int>(threadIdx.x), warp = tid >> 5, lane = tid & 31;
  const int group = warp % kGroups, part = warp / kGroups;
  const int o0 = static_cast<int>(blockIdx.x) * Tile::kOut;
  const int across = (l.out_width + Tile::kColumns - 1) / Tile::kColumns, down = (l.out_height + Tile::kRows - 1) / Tile::kRows;
  const int64_t out_size = static_cast<int64_t>(l.c_out) * l.out_height * l.out_width, tiles = l.samples * l.maps * across * down;
  const A eps = static_cast<A>(p.eps);
  int tap_at[kTaps];
  FISNET_UNROLL
  for (int t = 0; t < kTaps; ++t) tap_at[t] = image.slot(l.stride, (group + kGroups * t) / l.kernel, (group + kGroups * t) % l.kernel) * 8;
  A sum[kTaps][2][MT][4] = {};

  for (int64_t tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int64_t map = tile / (across * down), n = map / l.maps;
    const int within = static_cast<int>(tile - map * (across * down)), y0 = within / across * Tile::kRows, x0 = within % across * Tile::kColumns;
    const T* const g = static_cast<const T*>(p.R_out) + map * out_size;
    const T* const g_bar = static_cast<const T*>(p.R_out_bar) + map * out_size;
    const T* const z = static_cast<const T*>(p.z) + n * out_size;
    const T* const carrier = p.carrier ? static_cast<const T*>(p.carrier) + n * out_size : nullptr;
    __syncthreads();  // the tile before is used up
    constexpr int kCount = Tile::kPositions * (Tile::kOut / W), kTogether = kTaps > 3 && kCount % (kAhead * kThreads) == 0 ? kAhead : 1;
    static_assert(kCount % kThreads == 0, "every thread has as many vectors");
    for (int i = tid; i < kCount; i += kTogether * kThreads) {
      Item item[kTogether];
      A value[kTogether][W], den[kTogether][W], s[kTogether][W] = {}, z_bar[kTogether][W] = {};
      FISNET_UNROLL
      for (int k = 0; k < kTogether; ++k) {
        item[k] = item_of<W, Tile::kOut>(l, i + k * kThreads, y0, x0, Tile::kPositions, Tile::kColumns, o0);
        if (!item[k].inside) continue;
        load_denominators<T, W>(value[k], den[k], z, static_cast<const A*>(p.box), l, item[k], o0 + item[k].c, eps);
        load<T, W>(s[k], g + item[k].at);
        load<T, W>(z_bar[k], g_bar + item[k].at);
        if (carrier && carrier != z) load<T, W>(value[k], carrier + item[k].at);
      }
      FISNET_UNROLL
      for (int k = 0; k < kTogether; ++k) {
        if (item[k].inside) {
          FISNET_UNROLL
          for (int j = 0; j < W; ++j) {
            s[k][j] = Divisor<A>(den[k][j])(s[k][j]);
            z_bar[k][j] *= -s[k][j];
            if (carrier) s[k][j] *= value[k][j];
          }
        }
        store_shared<T, W>(s_tile + item[k].slot * kPitch + item[k].c, s[k]);
        store_shared<T, W>(z_tile + item[k].slot * kPitch + item[k].c, z_bar[k]);
      }
    }
    load_image<T>(p, image, map, y0, x0, planes, planes + plane);
    __syncthreads();

    const int rows = l.out_height - y0 < Tile::kRows ? l.out_height - y0 : Tile::kRows;
    for (int row = part; row < rows; row += kSplit) {
      const T* const pixels = planes + row * l.stride * image.pitch * 8;
      const T* const s = s_tile + row * 16 * kPitch;
      const T* const z_bar = z_tile + row * 16 * kPitch;
      if constexpr (sizeof(T) == 2) {
        uint32_t left[2][MT][4];
        const int mine = ((lane >> 4) * 8 + (lane & 7)) * kPitch + (lane >> 3 & 1) * 8;
        FISNET_UNROLL
        for (int m = 0; m < MT; ++m) {
          ldmatrix_x4_trans(left[0][m], s + mine + 16 * m);
          ldmatrix_x4_trans(left[1][m], z_bar + mine + 16 * m);
        }
        const T* const mine_b = pixels + (lane >> 4) * plane + ((lane >> 3 & 1) * 8 + (lane & 7)) * 8;
        FISNET_UNROLL
        for (int t = 0; t < kTaps; ++t) {
          if (group + kGroups * t >= l.taps()) continue;
          uint32_t right[4];
          ldmatrix_x4_trans(right, mine_b + tap_at[t]);
          const uint32_t kind[2][2] = {{right[0], right[1]}, {right[2], right[3]}};
          FISNET_UNROLL
          for (int q = 0; q < 2; ++q) {
            FISNET_UNROLL
            for (int m = 0; m < MT; ++m) MmaK16<T>::run(sum[t][q][m], left[q][m], kind[q]);
          }
        }
      } else {
        const int g_row = lane >> 2, pair = 2 * (lane & 3);
        for (int k = 0; k < 16; ++k) {
          A left[2][MT][2];
          FISNET_UNROLL
          for (int m = 0; m < MT; ++m) {
            const int at = k * kPitch + 16 * m + g_row;
            left[0][m][0] = s[at];
            left[0][m][1] = s[at + 8];
            left[1][m][0] = z_bar[at];
            left[1][m][1] = z_bar[at + 8];
          }
          FISNET_UNROLL
          for (int t = 0; t < kTaps; ++t) {
            if (group + kGroups * t >= l.taps()) continue;
            FISNET_UNROLL
            for (int q = 0; q < 2; ++q) {
              const T* const b = pixels + q * plane + tap_at[t] + k * 8 + pair;
              const A b0 = b[0], b1 = b[1];
              FISNET_UNROLL
              for (int m = 0; m < MT; ++m) {
                sum[t][q][m][0] += left[q][m][0] * b0;
                sum[t][q][m][1] += left[q][m][0] * b1;
                sum[t][q][m][2] += left[q][m][1] * b0;
                sum[t][q][m][3] += left[q][m][1] * b1;
              }
            }
          }
        }
      }
    }
  }

  A* const partial = static_cast<A*>(p.partial) + static_cast<int64_t>(static_cast<int>(blockIdx.y) * kSplit + part) * l.c_out * l.taps() * kZbSums;
  FISNET_UNROLL
  for (int t = 0; t < kTaps; ++t) {
    const int tap = group + kGroups * t;
    if (tap >= l.taps()) continue;
    FISNET_UNROLL
    for (int m = 0; m < MT; ++m) {
      FISNET_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int o = o0 + 16 * m + (lane >> 2) + (i < 2 ? 0 : 8);
        if (o >= l.c_out) continue;
        A* const to = partial + (o * l.taps() + tap) * kZbSums + 2 * (lane & 3) + (i & 1);
        to[0] = sum[t][0][m][i];
        to[8] = sum[t][1][m][i];
      }
    }
  }
}

// W_bar = sum z_bar x + [W > 0] (sum s c+ - l sum_inside z_bar) + [W < 0] (sum s c- - h sum_inside z_bar): the box of z' is a
// convolution of constant images, so its share is the sum of z_bar over the positions where the tap is inside.
// shift_bar = (1 - [b > 0] min l - [b < 0] max h) sum z_bar.
// A block owns one weight position (tap = blockIdx.x, o = blockIdx.y): thread (j, i) adds sum i of every 16th slab, then the 16
// parts are added in order, in double. Deterministic.
// no 16-byte loads and stores: partial weight gradients, one weight a thread
template <typename T>
__global__ void __launch_bounds__(kThreads, 4) zb_wgrad_finish_kernel(ZbBackwardParams p) {
  using A = Acc<T>;
  FISNET_SHARED(double, part, kThreads);
  const ZbLayer& l = p.layer;
  const int tid = static_cast<int>(threadIdx.x), tap = static_cast<int>(blockIdx.x), o = static_cast<int>(blockIdx.y);
  const int64_t slab = static_cast<int64_t>(l.c_out) * l.taps() * kZbSums;
  const A* const from = static_cast<const A*>(p.partial) + (o * l.taps() + tap) * kZbSums + tid % kZbSums;
  double total = 0;
  for (int i = tid / kZbSums; i < p.slabs; i += kThreads / kZbSums) total += static_cast<double>(from[i * slab]);
  part[tid] = total;
  __syncthreads();
  if (tid < kZbSums) {
    for (int i = 1; i < kThreads / kZbSums; ++i) total += part[i * kZbSums + tid];
    part[tid] = total;
  }
  __syncthreads();
  const A* const low = static_cast<const A*>(p.low);
  const A* const high = static_cast<const A*>(p.high);
  if (tid < l.c_in) {
    const int at = (o * l.c_in + tid) * l.taps() + tap;
    const A w = to_acc(static_cast<const T*>(p.W)[at]);
    double bar = part[8 + tid];
    if (w > A(0)) bar += part[2 * tid] - low[tid] * part[12];
    if (w < A(0)) bar += part[2 * tid + 1] - high[tid] * part[12];
    static_cast<T*>(p.W_bar)[at] = from_acc<T>(static_cast<A>(bar));
  }
  if (tid == 0 && tap == 0 && p.shift_bar) {
    A least = low[0], most = high[0];
    for (int c = 1; c < l.c_in; ++c) {
      least = low[c] < least ? low[c] : least;
      most = high[c] > most ? high[c] : most;
    }
    const A b = static_cast<const A*>(p.shift)[o];
    static_cast<A*>(p.shift_bar)[o] = static_cast<A>(part[13] * (A(1) - (b > A(0) ? least : A(0)) - (b < A(0) ? most : A(0))));
  }
}

// ---- launch --------------------------------------------------------------------------------------------------------------------
unsigned rows_of_grid(int64_t count) { return static_cast<unsigned>(std::min<int64_t>(count, 65535)); }
unsigned pack_blocks(int64_t count) { return static_cast<unsigned>(std::min<int64_t>(ceil_div<int64_t>(count, kThreads), 4096)); }

template <typename T, int W, int MT, int NT>
int forward(const ZbParams& p, cudaStream_t stream) {
  using Tile = ForwardTile<MT>;
  const ZbLayer& l = p.layer;
  const int taps = l.phase_taps(), first = l.padding / l.stride;
  auto tiles = [&](int size, int by) { return ((size - 1 + l.padding) / l.stride - first) / by + 1; };
  const size_t rows = static_cast<size_t>(Tile::kRows + taps - 1) * (Tile::kColumns + taps - 1) + static_cast<size_t>(taps * taps * NT * 8);
  const dim3 grid(static_cast<unsigned>(tiles(l.height, Tile::kRows) * tiles(l.width, Tile::kColumns)), rows_of_grid(l.samples * l.maps));
  return static_cast<int>(launch(zb_kernel<T, W, MT, NT>, grid, dim3(kThreads), rows * (zb_chunk(sizeof(T)) + kVec<T>) * sizeof(T), stream, p));
}

template <typename T, int W>
int forward(const ZbParams& p, cudaStream_t stream) {
  const ZbLayer& l = p.layer;
  const int64_t packed = zb_packed(l, sizeof(T));
  const int error = static_cast<int>(launch(zb_pack_kernel<T>, dim3(pack_blocks(packed + l.boxes())), dim3(kThreads), 0, stream, p, static_cast<int>(packed), static_cast<int>(l.boxes())));
  if (error) return error;
  constexpr bool kWide = sizeof(T) == 8;  // double: fewer accumulators
  switch ((l.phases() * l.c_in * 2 + 7) / 8) {
    case 1: return forward<T, W, kWide ? 1 : 4, 1>(p, stream);
    case 2: return forward<T, W, kWide ? 1 : 2, 2>(p, stream);
    case 3: return forward<T, W, kWide ? 1 : 2, 3>(p, stream);
    case 4: return forward<T, W, kWide ? 1 : 2, 4>(p, stream);
    default: return static_cast<int>(cudaErrorInvalidValue);
  }
}

template <typename T, int W, int kTaps, int kSplit>
int weight_gradient(const ZbBackwardParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(ceil_div(p.layer.c_out, WeightTile<T>::kOut)), static_cast<unsigned>(p.slabs / kSplit));
  return static_cast<int>(launch(zb_wgrad_kernel<T, W, kTaps, kSplit>, grid, dim3(kThreads), WeightTile<T>::bytes(p.layer), stream, p));
}

template <typename T, int W>
int backward(const ZbBackwardParams& p, cudaStream_t stream) {
  using Tile = BackwardTile<T>;
  const ZbLayer& l = p.layer;
  const int64_t packed = zb_packed_backward(l, sizeof(T));
  int error = static_cast<int>(launch(zb_pack_backward_kernel<T>, dim3(pack_blocks(packed + l.boxes())), dim3(kThreads), 0, stream, p, static_cast<int>(packed), static_cast<int>(l.boxes())));
  if (error) return error;
  const dim3 grid(static_cast<unsigned>(ceil_div(l.out_height, Tile::kRows) * ceil_div(l.out_width, Tile::kColumns)), rows_of_grid(l.samples));
  error = static_cast<int>(launch(zb_backward_kernel<T, W>, grid, dim3(kThreads), Tile::bytes(l), stream, p));
  if (error || !p.W_bar) return error;
  // few taps: half of the warps for them, so that all have as many
  error = l.taps() <= 12   ? weight_gradient<T, W, 3, 2>(p, stream)
          : l.taps() <= 16 ? weight_gradient<T, W, 4, 2>(p, stream)
          : l.taps() <= 32 ? weight_gradient<T, W, 4, 1>(p, stream)
                           : weight_gradient<T, W, 7, 1>(p, stream);
  if (error) return error;
  return static_cast<int>(launch(zb_wgrad_finish_kernel<T>, dim3(static_cast<unsigned>(l.taps()), static_cast<unsigned>(l.c_out)), dim3(kThreads), 0, stream, p));
}
}  // namespace

int zb_slabs(const ZbLayer& l, int size) {
  const int rows = size == 8 ? WeightTile<double>::kRows : WeightTile<float>::kRows;
  const int64_t tiles = l.samples * l.maps * ceil_div(l.out_height, rows) * ceil_div(l.out_width, 16);
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(tiles, 264 / ceil_div(l.c_out, zb_rows(size))));
  return static_cast<int>(blocks) * (l.taps() <= 16 ? 2 : 1);  // as `backward` splits
}

int launch_zb(const ZbParams& p, void* stream) {
  if (p.layer.samples * p.layer.maps == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = sizeof(T) < 8 && p.layer.channels_last && p.layer.c_out % kVec<T> == 0 && aligned16(p.R_out, p.carrier, p.z, p.box);
    return wide ? forward<T, sizeof(T) < 8 ? kVec<T> : 1>(p, st) : forward<T, 1>(p, st);
  });
}

int launch_zb_backward(const ZbBackwardParams& p, void* stream) {
  if (p.layer.samples * p.layer.maps == 0) return 0;
  const auto st = static_cast<cudaStream_t>(stream);
  return with_type(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const bool wide = sizeof(T) < 8 && p.layer.channels_last && p.layer.c_out % kVec<T> == 0 && aligned16(p.R_out, p.carrier, p.z, p.R_out_bar, p.carrier_bar, p.box);
    return wide ? backward<T, sizeof(T) < 8 ? kVec<T> : 1>(p, st) : backward<T, 1>(p, st);
  });
}

FISNET_LAUNCHER(zb, launch_zb);
FISNET_LAUNCHER(zb_backward, launch_zb_backward);
FISNET_KERNEL(zb_kernel<float, 4, 2, 3>);
FISNET_KERNEL(zb_kernel<float, 4, 4, 1>);
FISNET_KERNEL(zb_kernel<__nv_bfloat16, 8, 2, 3>);
FISNET_KERNEL(zb_kernel<__nv_bfloat16, 8, 4, 1>);
FISNET_KERNEL(zb_backward_kernel<float, 4>);
FISNET_KERNEL(zb_backward_kernel<__nv_bfloat16, 8>);
FISNET_KERNEL(zb_wgrad_kernel<float, 4, 7, 1>);
FISNET_KERNEL(zb_wgrad_kernel<__nv_bfloat16, 8, 7, 1>);
}  // namespace fisnet
