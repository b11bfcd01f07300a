// ldmatrix and mma.sync of one warp, with the fragment layouts of the PTX ISA (m16n8k16 for bf16 and f16, m16n8k8 for tf32).
// Products are exact and added in fp32 in order of k; a GPU rounds inside in ways of its own.
#pragma once
#include "cuda_builtins.h"

namespace emu {
struct MatrixLoad {
  const void* row;
  uint32_t out[4];
  int count;  // of 8 x 8 matrices; lane 8 j + r gives row r of matrix j
  bool transposed;
};

// Rows that are read together should lie in different 16-byte columns of the 128 bytes that shared memory serves at once.
EMU_UNSEEN inline void count_conflicts(void* const* args, int matrices) {
  ++stats.ldmatrix;
  for (int j = 0; j < matrices; ++j) {
    const void* rows[8];
    int hits[8] = {}, worst = 0;
    for (int r = 0; r < 8; ++r) {
      rows[r] = static_cast<MatrixLoad*>(args[8 * j + r])->row;
      bool repeated = false;  // a row that is read twice is fetched once
      for (int q = 0; q < r; ++q) repeated |= rows[q] == rows[r];
      const int hit = repeated ? 0 : ++hits[reinterpret_cast<uintptr_t>(rows[r]) / 16 % 8];
      worst = hit > worst ? hit : worst;
    }
    stats.ldmatrix_conflicts += static_cast<uint64_t>(worst - 1);
  }
}

EMU_UNSEEN inline void load_matrices(void* const* args, uint32_t mask) {
  if (mask != 0xffffffffu) fail("ldmatrix needs all 32 lanes");
  const int count = static_cast<MatrixLoad*>(args[0])->count;
  count_conflicts(args, count);
  for (int lane = 0; lane < 32; ++lane) {
    auto* me = static_cast<MatrixLoad*>(args[lane]);
    for (int j = 0; j < count; ++j) {
      uint16_t element[2];
      for (int i = 0; i < 2; ++i) {
        const int across = 2 * (lane & 3) + i, down = lane >> 2;
        const void* row = static_cast<MatrixLoad*>(args[8 * j + (me->transposed ? across : down)])->row;
        std::memcpy(&element[i], static_cast<const char*>(row) + 2 * (me->transposed ? down : across), 2);
      }
      me->out[j] = uint32_t{element[0]} | uint32_t{element[1]} << 16;
    }
  }
}
EMU_UNSEEN inline void ldmatrix(uint32_t* out, const void* row, int count, bool transposed) {
  MatrixLoad load{row, {}, count, transposed};
  if (static_cast<int>(lane_id()) < 8 * count) touch_row(row, __builtin_return_address(0));
  collective(0xffffffffu, &load_matrices, &load, "ldmatrix", false);
  for (int i = 0; i < count; ++i) out[i] = load.out[i];
}

enum class Operand { bf16, f16, tf32 };
struct Product {
  const uint32_t *a, *b;
  float* d;
  const float* c;
};
EMU_UNSEEN inline float half_value(Operand type, uint32_t bits) {
  if (type == Operand::bf16) return emu::bits<float>(bits << 16);
  __half_raw raw;
  raw.x = static_cast<unsigned short>(bits);
  return __half2float(__half(raw));
}
EMU_UNSEEN inline float tf32_value(uint32_t bits) {
  if (opt.strict_tf32 && (bits & 0x1fffu)) fail("an operand of a tf32 product is not rounded to tf32");
  return emu::bits<float>(bits & ~0x1fffu);
}

template <Operand kType> EMU_UNSEEN void multiply(void* const* args, uint32_t mask) {
  if (mask != 0xffffffffu) fail("mma.sync needs all 32 lanes");
  constexpr int kDepth = kType == Operand::tf32 ? 8 : 16;
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const auto* me = static_cast<Product*>(args[lane]);
    const int group = lane >> 2, t = lane & 3;
    if constexpr (kType == Operand::tf32) {
      for (int i = 0; i < 4; ++i) a[group + 8 * (i & 1)][t + 4 * (i >> 1)] = tf32_value(me->a[i]);
      for (int i = 0; i < 2; ++i) b[t + 4 * i][group] = tf32_value(me->b[i]);
    } else {  // two elements a register
      const auto element = [](const uint32_t* registers, int i) { return half_value(kType, registers[i >> 1] >> 16 * (i & 1) & 0xffffu); };
      for (int i = 0; i < 8; ++i) a[group + 8 * ((i >> 1) & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = element(me->a, i);
      for (int i = 0; i < 4; ++i) b[2 * t + (i & 1) + 8 * (i >> 1)][group] = element(me->b, i);
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const auto* me = static_cast<Product*>(args[lane]);
    for (int i = 0; i < 4; ++i) {
      const int row = (lane >> 2) + 8 * (i >> 1), column = 2 * (lane & 3) + (i & 1);
      float sum = 0;
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[k][column];
      me->d[i] = me->c[i] + sum;
    }
  }
  ++stats.mma;
}
template <Operand kType> EMU_UNSEEN void mma(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  Product p{a, b, d, c};
  collective(0xffffffffu, &multiply<kType>, &p, "mma", false);
}
}  // namespace emu
