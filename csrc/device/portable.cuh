// One kernel source, two compilers: nvcc (device code) and g++ (with FISNET_EMU: the emulator, for tests without a GPU).
// Kernels use CUDA's own spelling; only what g++ cannot know is wrapped here.
//
//   FISNET_SHARED(T, name, N);    N elements of static shared memory, aligned to 16 bytes, at the start of a function body
//   FISNET_DYN_SMEM(T, name);     the dynamic shared memory of the launch, as T*, aligned to 128 bytes
//   FISNET_UNROLL                 before a loop
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(FISNET_EMU)
#include "cuda_builtins.h"
#define FISNET_DYN_SMEM(T, name) T* const name = static_cast<T*>(::emu::dynamic_shared())
#define FISNET_SHARED(T, name, N)                                                                 \
  static ::emu::SharedArray name##_array{sizeof(T) * (N), alignof(T) < 16 ? 16 : alignof(T), 0, 0}; \
  T* const name = static_cast<T*>(::emu::static_shared(name##_array))
#define FISNET_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <mutex>
#include <set>
#include <shared_mutex>
#define FISNET_DYN_SMEM(T, name)                                     \
  extern __shared__ __align__(128) unsigned char fisnet_dyn_smem_[]; \
  T* const name = reinterpret_cast<T*>(fisnet_dyn_smem_)
#define FISNET_SHARED(T, name, N) __shared__ __align__(16) T name[N]
#define FISNET_UNROLL _Pragma("unroll")
#endif

namespace fisnet {
#if !defined(FISNET_EMU)
// A block has 48 KB of shared memory, static arrays included, unless its kernel asks for more. Dynamic shared memory of at most
// this many bytes fits beside any arrays of ours.
constexpr size_t kSureShared = 16 * 1024;

// Lets `function` have all the shared memory of the current device, so that launches from other threads, of other sizes, never
// lower what one of them needs. Asks the driver once for each kernel and device: that costs as much as a launch.
inline cudaError_t allow_shared(const void* function) {
  static std::shared_mutex mutex;
  static std::set<std::pair<const void*, int>> allowed;
  int device = 0, most = 0;
  cudaError_t e = cudaGetDevice(&device);
  if (e != cudaSuccess) return e;
  {
    const std::shared_lock<std::shared_mutex> lock(mutex);
    if (allowed.count({function, device})) return cudaSuccess;
  }
  cudaFuncAttributes has;
  e = cudaFuncGetAttributes(&has, function);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (e == cudaSuccess) e = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most - static_cast<int>(has.sharedSizeBytes));
  if (e != cudaSuccess) return e;
  const std::unique_lock<std::shared_mutex> lock(mutex);
  allowed.insert({function, device});
  return cudaSuccess;
}
#endif

// ---- launch: the same call in both worlds, no <<<>>> ------------------------------------------------
// Arguments become the kernel's parameter types here, so a wrong one is a compile error.
template <typename... P, typename... A>
inline cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
#if defined(FISNET_EMU)
  return emu::launch(kernel, grid, block, smem, stream, static_cast<P>(args)...);
#else
  if (smem > kSureShared) {
    const cudaError_t e = allow_shared(reinterpret_cast<const void*>(kernel));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t cfg = {};
  cfg.gridDim = grid; cfg.blockDim = block; cfg.dynamicSmemBytes = smem; cfg.stream = stream;
  return cudaLaunchKernelEx(&cfg, kernel, static_cast<P>(args)...);
#endif
}

// ---- 16 bytes to global or to shared memory in one access -------------------------------------------------------------------
// Left to itself, nvcc splits a vector store into four of 4 bytes where it stands behind a condition. The instruction names the
// kind of memory, so there are two functions, and the wrong one is an illegal access on a GPU; the emulator refuses it too.
__device__ __forceinline__ void store16(void* gmem, const void* from) {
#if defined(FISNET_EMU)
  emu::check_space(gmem, false);
  struct alignas(16) Bits { uint64_t part[2]; } bits;
  memcpy(&bits, from, sizeof(bits));
  *static_cast<Bits*>(gmem) = bits;
#else
  uint4 q;
  memcpy(&q, from, sizeof(q));
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(__cvta_generic_to_global(gmem)), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
#endif
}

__device__ __forceinline__ void store16_shared(void* smem, const void* from) {
#if defined(FISNET_EMU)
  emu::check_space(smem, true);
  struct alignas(16) Bits { uint64_t part[2]; } bits;
  memcpy(&bits, from, sizeof(bits));
  *static_cast<Bits*>(smem) = bits;
#else
  uint4 q;
  memcpy(&q, from, sizeof(q));
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(s), "r"(q.x), "r"(q.y), "r"(q.z), "r"(q.w) : "memory");
#endif
}

// ---- shared memory in the main loops of products --------------------------------------------------------------------------
// A warp's loads and stores: the emulator wants all 32 lanes at them, and counts bank conflicts. (Where lanes diverge: a plain
// load, store16_shared.)
__device__ __forceinline__ uint32_t lds32(const void* smem) {
#if defined(FISNET_EMU)
  return emu::lds32(smem);
#else
  uint32_t r;
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("ld.shared.u32 %0, [%1];\n" : "=r"(r) : "r"(s) : "memory");
  return r;
#endif
}
__device__ __forceinline__ void lds128(uint32_t (&r)[4], const void* smem) {
#if defined(FISNET_EMU)
  emu::lds128(r, smem);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];\n" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}
__device__ __forceinline__ void sts128(void* smem, const uint32_t (&r)[4]) {
#if defined(FISNET_EMU)
  emu::sts128(smem, r);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"r"(s), "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3]) : "memory");
#endif
}

// ---- cp.async ------------------------------------------------------------------------------------------
// 16 bytes global -> shared; ok == false writes zeros and does not read src.
__device__ __forceinline__ void cp_async16(void* smem, const void* gmem, bool ok) {
#if defined(FISNET_EMU)
  emu::cp_async(smem, gmem, 16, ok ? 16 : 0);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(smem));
  const int n = ok ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(s), "l"(gmem), "r"(n) : "memory");
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#if defined(FISNET_EMU)
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;\n" ::: "memory");
#endif
}
template <int N> __device__ __forceinline__ void cp_async_wait() {
#if defined(FISNET_EMU)
  emu::cp_async_wait(N);
#else
  asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
#endif
}

// ---- tensor cores ----------------------------------------------------------------------------------------
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#if defined(FISNET_EMU)
  emu::ldmatrix(&r, &row, 1, false);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(FISNET_EMU)
  emu::ldmatrix(&r, &row, 1, true);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}
// Several at once: r[i] from row[i]. (The emulator runs them together, which is faster there.)
template <int N> __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[N][4], const void* const (&row)[N]) {
#if defined(FISNET_EMU)
  emu::ldmatrix(r, row, N, false);
#else
  FISNET_UNROLL
  for (int i = 0; i < N; ++i) ldmatrix_x4(r[i], row[i]);
#endif
}
template <int N> __device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[N][4], const void* const (&row)[N]) {
#if defined(FISNET_EMU)
  emu::ldmatrix(r, row, N, true);
#else
  FISNET_UNROLL
  for (int i = 0; i < N; ++i) ldmatrix_x4_trans(r[i], row[i]);
#endif
}
template <typename T> struct MmaK16;   // d = a * b + d, m16n8k16, fp32 accumulators
template <> struct MmaK16<__nv_bfloat16> {
  static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FISNET_EMU)
    emu::mma<emu::Operand::bf16>(&d, &a, &b, 1, 1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};
template <> struct MmaK16<__half> {
  static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FISNET_EMU)
    emu::mma<emu::Operand::f16>(&d, &a, &b, 1, 1);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {   // m16n8k8
#if defined(FISNET_EMU)
  emu::mma<emu::Operand::tf32>(&d, &a, &b, 1, 1);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
// d[m][n] += a[m] b[n]: m16n8k16 of T, or m16n8k8 for float (operands rounded to tf32). The emulator runs them together, which is
// faster there.
template <typename T, int MT, int NT>
__device__ __forceinline__ void mma_tiles(float (&d)[MT][NT][4], const uint32_t (&a)[MT][4], const uint32_t (&b)[NT][2]) {
#if defined(FISNET_EMU)
  constexpr emu::Operand kType = sizeof(T) == 4 ? emu::Operand::tf32 : std::is_same_v<T, __half> ? emu::Operand::f16 : emu::Operand::bf16;
  emu::mma<kType>(d[0], a, b, MT, NT);
#else
  FISNET_UNROLL
  for (int m = 0; m < MT; ++m) {
    FISNET_UNROLL
    for (int n = 0; n < NT; ++n) {
      if constexpr (sizeof(T) == 4) mma_tf32(d[m][n], a[m], b[n]);
      else MmaK16<T>::run(d[m][n], a[m], b[n]);
    }
  }
#endif
}
// max(x, 0) of the two elements of 2 bytes, or the one float, in a register; NaN stays NaN.
template <typename T> __device__ __forceinline__ uint32_t relu_bits(uint32_t x) {
#if defined(FISNET_EMU)
  constexpr int kBits = 8 * sizeof(T);
  constexpr uint32_t kSign = 1u << (kBits - 1), kInfinity = kBits == 32 ? 0x7f800000u : std::is_same_v<T, __half> ? 0x7c00u : 0x7f80u;
  for (int at = 0; at < 32; at += kBits) {
    const uint32_t part = x >> at & (kSign | (kSign - 1));
    if (part & kSign && (part ^ kSign) <= kInfinity) x &= ~((kSign | (kSign - 1)) << at);
  }
  return x;
#else
  uint32_t r;
  if constexpr (sizeof(T) == 4) asm("max.NaN.f32 %0, %1, 0f00000000;\n" : "=r"(r) : "r"(x));
  else if constexpr (std::is_same_v<T, __half>) asm("max.NaN.f16x2 %0, %1, %2;\n" : "=r"(r) : "r"(x), "r"(0u));
  else asm("max.NaN.bf16x2 %0, %1, %2;\n" : "=r"(r) : "r"(x), "r"(0u));
  return r;
#endif
}
__device__ __forceinline__ uint32_t to_tf32(float x) {   // cvt.rna: to nearest, ties away from zero
#if defined(FISNET_EMU)
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7f800000u) != 0x7f800000u) u += 0x1000u;
  else if (u & 0x007fffffu) return 0x7fffe000u;  // a NaN whose payload is all in the bits that go stays NaN
  return u & ~0x1fffu;
#else
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(u) : "f"(x));
  return u;
#endif
}
}  // namespace fisnet
