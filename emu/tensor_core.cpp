// mma.sync of one warp, with the fragment layouts of the PTX ISA (m16n8k16 for bf16 and f16, m16n8k8 for tf32). Products are
// exact and added in fp32 in order of k; a GPU rounds inside in ways of its own.
#include <algorithm>
#include <cstring>

#include "internal.h"

namespace emu {
namespace {
struct Product {
  const uint32_t (*a)[4];  // [down]
  const uint32_t (*b)[2];  // [across]
  float (*d)[4];           // [down][across]
  int down, across;
};

float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <Operand kType> float value(uint32_t bits) {
  if constexpr (kType == Operand::tf32) {
    if (opt.strict_tf32 && (bits & 0x1fffu)) fail("an operand of a tf32 product is not rounded to tf32");
    return as_float(bits & ~0x1fffu);
  } else if constexpr (kType == Operand::bf16) {
    return as_float(bits << 16);
  } else {  // the exponent's bias differs by 112; that of infinities and NaN by 224
    const uint32_t sign = (bits & 0x8000u) << 16, size = (bits & 0x7fffu) << 13;
    const float x = (bits & 0x7c00u) == 0x7c00u ? as_float(size | 0x7f800000u) : as_float(size) * 0x1p112f;
    uint32_t wide;
    std::memcpy(&wide, &x, sizeof wide);
    return as_float(wide | sign);
  }
}

template <int kDepth> struct Left { float at[16][kDepth]; };
template <int kDepth> struct Right { float at[kDepth][8]; };

template <Operand kType, int kDepth> void unpack(Left<kDepth>& a, void* const* args, int m) {
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* const from = static_cast<const Product*>(args[lane])->a[m];
    const int group = lane >> 2, t = lane & 3;
    if constexpr (kType == Operand::tf32) {
      for (int i = 0; i < 4; ++i) a.at[group + 8 * (i & 1)][t + 4 * (i >> 1)] = value<kType>(from[i]);
    } else {  // two elements a register
      for (int i = 0; i < 8; ++i) a.at[group + 8 * ((i >> 1) & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = value<kType>(from[i >> 1] >> 16 * (i & 1) & 0xffffu);
    }
  }
}
template <Operand kType, int kDepth> void unpack(Right<kDepth>& b, void* const* args, int n) {
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* const from = static_cast<const Product*>(args[lane])->b[n];
    const int group = lane >> 2, t = lane & 3;
    if constexpr (kType == Operand::tf32) {
      for (int i = 0; i < 2; ++i) b.at[t + 4 * i][group] = value<kType>(from[i]);
    } else {
      for (int i = 0; i < 4; ++i) b.at[2 * t + (i & 1) + 8 * (i >> 1)][group] = value<kType>(from[i >> 1] >> 16 * (i & 1) & 0xffffu);
    }
  }
}

template <Operand kType> void multiply(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("mma.sync needs all 32 lanes");
  constexpr int kDepth = kType == Operand::tf32 ? 8 : 16, kMost = 16;
  const int down = static_cast<const Product*>(args[0])->down, across = static_cast<const Product*>(args[0])->across;
  Right<kDepth> b[kMost];
  for (int first = 0; first < across; first += kMost) {
    const int count = std::min(kMost, across - first);
    for (int n = 0; n < count; ++n) unpack<kType>(b[n], args, first + n);
    for (int m = 0; m < down; ++m) {
      Left<kDepth> a;
      unpack<kType>(a, args, m);
      for (int n = 0; n < count; ++n) {
        float sum[16][8];
        for (int row = 0; row < 16; ++row) {
          float s[8] = {};
          for (int k = 0; k < kDepth; ++k)
            for (int column = 0; column < 8; ++column) s[column] += a.at[row][k] * b[n].at[k][column];
          std::memcpy(sum[row], s, sizeof s);
        }
        for (int lane = 0; lane < 32; ++lane) {
          float* const d = static_cast<const Product*>(args[lane])->d[m * across + first + n];
          for (int i = 0; i < 4; ++i) d[i] += sum[(lane >> 2) + 8 * (i >> 1)][2 * (lane & 3) + (i & 1)];
        }
      }
    }
  }
  stats.mma += static_cast<uint64_t>(down * across);
}
}  // namespace

template <Operand kType> void mma(float (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[2], int down, int across) {
  Product p{a, b, d, down, across};
  collective(~0u, &multiply<kType>, &p, "mma", false);
}
template void mma<Operand::bf16>(float (*)[4], const uint32_t (*)[4], const uint32_t (*)[2], int, int);
template void mma<Operand::f16>(float (*)[4], const uint32_t (*)[4], const uint32_t (*)[2], int, int);
template void mma<Operand::tf32>(float (*)[4], const uint32_t (*)[4], const uint32_t (*)[2], int, int);
}  // namespace emu
