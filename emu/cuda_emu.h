// cuda_emu.h - run CUDA kernel source compiled by a host C++ compiler (g++ -x c++ -DFIS_EMU).
// One block at a time; the block's threads are fibers; a fiber runs until it reaches a barrier or a warp
// collective, so the schedule is deterministic for a given seed.  See cuda_emu.cpp for the checks.
#pragma once
#include <cuda_runtime_api.h>   // dim3, cudaStream_t, cudaError_t (types only; nothing of cudart is called)
#include <vector_functions.h>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#define EMU_NOSAN __attribute__((no_sanitize("thread")))   // emulator code is not race-checked
#define EMU_NOSANI EMU_NOSAN __attribute__((noinline))     // gcc: else inlined into instrumented code
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "use FISNET_SHARED / FISNET_DYN_SMEM");

namespace emu {
enum class Order { in_order, reversed, random };
struct Options {
  Order order = Order::in_order;
  uint64_t seed = 1;
  bool async_random = false;  // cp.async: each copy lands at issue or at wait, by coin flip; else at wait
  bool check_races = false;   // needs the kernel TU compiled with -fsanitize=thread (no libtsan)
  bool check_bounds = false;  // likewise; accesses outside allow()ed buffers / smem / own stack are errors
  bool check_global = false;  // likewise; conflicting plain accesses to an allow()ed writable buffer (other block, or no barrier between)
  bool strict_tf32 = true;    // mma tf32 operands must have been rounded (low 13 bits zero)
  uint8_t poison = 0xFF;      // smem fill at block start: NaN in fp32/bf16/fp16
};
struct Stats { uint64_t blocks, threads, switches, barriers, mma, ldmatrix, ldmatrix_extra_wavefronts, cp_async, smem_bytes; };
extern Options opt;
extern Stats stats;
struct Error : std::runtime_error { using std::runtime_error::runtime_error; };

void allow(const void* p, size_t bytes, bool writable);  // for check_bounds
void clear_allowed();
void run_grid(dim3 grid, dim3 block, size_t dyn_smem, const std::function<void()>& thread_body);
void* dyn_smem();
int new_static_slot(size_t bytes, size_t align);
void* static_slot(int id);
void syncthreads(const char* file, int line, int site);
int syncthreads_count(int pred, const char* file, int line, int site);
// Every lane named in mask deposits `arg`; the last one to arrive runs op(args, mask) for the warp.
using WarpOp = void (*)(void* const* args, uint32_t mask);
void warp_collective(uint32_t mask, WarpOp op, void* arg, const char* what, bool orders_memory);
void cp_async(void* smem_dst, const void* gmem_src, int bytes, int src_bytes);
void cp_async_commit();
void cp_async_wait(int pending_groups_allowed);
[[noreturn]] void fail(const std::string& msg);
void count_ldmatrix(void* const* rows, int n);

template <typename... P, typename... A>
inline cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t, A&&... args) {
  std::tuple<P...> params(std::forward<A>(args)...);
  run_grid(grid, block, smem, [&] { std::apply(kernel, params); });
  return cudaSuccess;
}

// ---- warp collectives --------------------------------------------------------------------------
template <typename T> struct ShflArg { T in, out; int src; };
template <typename T> EMU_NOSAN void shfl_op(void* const* a, uint32_t mask) {
  for (int l = 0; l < 32; ++l) if (mask >> l & 1) {
    auto* me = static_cast<ShflArg<T>*>(a[l]);
    if (!(mask >> me->src & 1)) fail("shfl reads lane " + std::to_string(me->src) + " that is not in the mask");
    me->out = static_cast<ShflArg<T>*>(a[me->src])->in;
  }
}
unsigned lane_id();
template <typename T> EMU_NOSANI T shfl(uint32_t mask, T v, int src) {
  ShflArg<T> a{v, v, src};
  warp_collective(mask, &shfl_op<T>, &a, "shfl", false);
  return a.out;
}
struct VoteArg { int pred; unsigned out; };
EMU_NOSAN inline void ballot_op(void* const* a, uint32_t mask) {
  unsigned r = 0;
  for (int l = 0; l < 32; ++l) if ((mask >> l & 1) && static_cast<VoteArg*>(a[l])->pred) r |= 1u << l;
  for (int l = 0; l < 32; ++l) if (mask >> l & 1) static_cast<VoteArg*>(a[l])->out = r;
}
EMU_NOSAN inline void nop_op(void* const*, uint32_t) {}

// ---- tensor-core fragments, layouts as in the PTX ISA (Matrix Fragments for mma.m16n8k{8,16}) ---
struct LdsmArg { const void* row; uint32_t out[4]; int n; bool trans; };
EMU_NOSAN inline void ldmatrix_op(void* const* a, uint32_t mask) {
  if (mask != 0xffffffffu) fail("ldmatrix needs all 32 lanes");
  auto* L0 = static_cast<LdsmArg*>(a[0]);
  void* rows[32];
  for (int l = 0; l < 32; ++l) {
    rows[l] = const_cast<void*>(static_cast<LdsmArg*>(a[l])->row);
    if (l < L0->n * 8 && (reinterpret_cast<uintptr_t>(rows[l]) & 15)) fail("ldmatrix row address not 16-byte aligned, lane " + std::to_string(l));
  }
  count_ldmatrix(rows, L0->n);
  for (int l = 0; l < 32; ++l) {
    auto* me = static_cast<LdsmArg*>(a[l]);
    for (int j = 0; j < me->n; ++j) {
      uint16_t e[2];
      for (int i = 0; i < 2; ++i) {
        int r = me->trans ? 2 * (l & 3) + i : l >> 2, c = me->trans ? l >> 2 : 2 * (l & 3) + i;
        std::memcpy(&e[i], static_cast<const char*>(rows[8 * j + r]) + 2 * c, 2);
      }
      me->out[j] = uint32_t(e[0]) | uint32_t(e[1]) << 16;
    }
  }
}
struct MmaArg { const uint32_t *a, *b; float* d; const float* c; };
enum class MmaT { bf16, f16, tf32 };
EMU_NOSAN inline float half_bits(MmaT t, uint16_t u) {
  if (t == MmaT::bf16) { uint32_t x = uint32_t(u) << 16; float f; std::memcpy(&f, &x, 4); return f; }
  __half_raw r; r.x = u; return __half2float(__half(r));
}
template <MmaT T> EMU_NOSAN void mma_op(void* const* args, uint32_t mask) {
  if (mask != 0xffffffffu) fail("mma.sync needs all 32 lanes");
  constexpr int K = T == MmaT::tf32 ? 8 : 16;
  float A[16][K], B[K][8];
  for (int l = 0; l < 32; ++l) {
    auto* m = static_cast<MmaArg*>(args[l]);
    const int g = l >> 2, t = l & 3;
    if constexpr (T == MmaT::tf32) {
      auto cv = [](uint32_t u) EMU_NOSAN {
        if (opt.strict_tf32 && (u & 0x1fffu)) fail("mma tf32 operand not rounded to tf32 (low 13 bits set)");
        u &= ~0x1fffu; float f; std::memcpy(&f, &u, 4); return f; };
      for (int i = 0; i < 4; ++i) A[g + 8 * (i & 1)][t + 4 * (i >> 1)] = cv(m->a[i]);
      for (int i = 0; i < 2; ++i) B[t + 4 * i][g] = cv(m->b[i]);
    } else {
      for (int i = 0; i < 8; ++i)   // a0..a7, two per register
        A[g + 8 * ((i >> 1) & 1)][2 * t + (i & 1) + 8 * (i >> 2)] = half_bits(T, uint16_t(m->a[i >> 1] >> 16 * (i & 1)));
      for (int i = 0; i < 4; ++i)
        B[2 * t + (i & 1) + 8 * (i >> 1)][g] = half_bits(T, uint16_t(m->b[i >> 1] >> 16 * (i & 1)));
    }
  }
  float P[16][8];
  for (int r = 0; r < 16; ++r) for (int c = 0; c < 8; ++c) P[r][c] = 0.f;
  for (int r = 0; r < 16; ++r) for (int k = 0; k < K; ++k) for (int c = 0; c < 8; ++c) P[r][c] += A[r][k] * B[k][c];
  for (int l = 0; l < 32; ++l) {
    auto* m = static_cast<MmaArg*>(args[l]);
    for (int i = 0; i < 4; ++i) m->d[i] = m->c[i] + P[(l >> 2) + 8 * (i >> 1)][2 * (l & 3) + (i & 1)];
  }
  ++stats.mma;
}
void touch_or_park(const void* p, size_t n, bool write, void* pc);
void touch(const void* p, size_t n, bool write, void* pc);   // feed the race/bounds checker by hand
EMU_NOSANI inline void ldmatrix(uint32_t* out, const void* row, int n, bool trans) {
  LdsmArg a{row, {0, 0, 0, 0}, n, trans};
  if (int(lane_id()) < 8 * n) touch(row, 16, false, __builtin_return_address(0));
  warp_collective(0xffffffffu, &ldmatrix_op, &a, "ldmatrix", false);
  for (int i = 0; i < n; ++i) out[i] = a.out[i];
}
template <MmaT T> EMU_NOSANI void mma(float* d, const uint32_t* a, const uint32_t* b, const float* c) {
  MmaArg m{a, b, d, c};
  warp_collective(0xffffffffu, &mma_op<T>, &m, "mma", false);
}
}  // namespace emu

// ---- CUDA built-ins ------------------------------------------------------------------------------
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;
using std::min; using std::max;
#define __syncthreads() ::emu::syncthreads(__FILE__, __LINE__, __COUNTER__)
#define __syncthreads_count(p) ::emu::syncthreads_count(p, __FILE__, __LINE__, __COUNTER__)
#define __syncthreads_or(p) (::emu::syncthreads_count(p, __FILE__, __LINE__, __COUNTER__) != 0)
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::warp_collective(mask, &emu::nop_op, nullptr, "syncwarp", true); }
template <typename T> T __shfl_sync(unsigned m, T v, int src, int w = 32) { int l = emu::lane_id(); return emu::shfl(m, v, (l & ~(w - 1)) | (src & (w - 1))); }
template <typename T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32) { int l = emu::lane_id(), s = l ^ x; return emu::shfl(m, v, (s & ~(w - 1)) > (l & ~(w - 1)) ? l : s); }
template <typename T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32) { int l = emu::lane_id(), s = l + int(d); return emu::shfl(m, v, (l & (w - 1)) + int(d) < w ? s : l); }
template <typename T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32) { int l = emu::lane_id(); return emu::shfl(m, v, (l & (w - 1)) - int(d) >= 0 ? l - int(d) : l); }
EMU_NOSANI inline unsigned __ballot_sync(unsigned m, int p) { emu::VoteArg a{p, 0}; emu::warp_collective(m, &emu::ballot_op, &a, "vote", false); return a.out; }
inline int __any_sync(unsigned m, int p) { return __ballot_sync(m, p) != 0; }
inline int __all_sync(unsigned m, int p) { return __ballot_sync(m, p) == m; }
template <typename T> EMU_NOSANI T atomicAdd(T* p, T v) { T o = *p; *p = T(o + v); return o; }   // fibers: no preemption
template <typename T> EMU_NOSANI T atomicMax(T* p, T v) { T o = *p; if (v > o) *p = v; return o; }
template <typename T> EMU_NOSANI T atomicCAS(T* p, T c, T v) { T o = *p; if (o == c) *p = v; return o; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
template <typename T> inline T __ldg(const T* p) { return *p; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline unsigned __float_as_uint(float f) { unsigned u; std::memcpy(&u, &f, 4); return u; }
inline float __uint_as_float(unsigned u) { float f; std::memcpy(&f, &u, 4); return f; }
