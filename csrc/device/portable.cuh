// One kernel source, two compilers: nvcc (device code) and g++ (with FISNET_EMU: the emulator, for tests without a GPU).
// Kernels use CUDA's own spelling; only what g++ cannot know is wrapped here.
//
//   FISNET_SHARED(T, name, N);    N elements of static shared memory, aligned to 16 bytes, at the start of a function body
//   FISNET_DYN_SMEM(T, name);     the dynamic shared memory of the launch, as T*, aligned to 128 bytes
//   FISNET_UNROLL                 before a loop
#pragma once
#include <cstdint>
#include <utility>
#if defined(FISNET_EMU)
#include "cuda_builtins.h"
#include "tensor_core.h"
#define FISNET_DYN_SMEM(T, name) T* const name = static_cast<T*>(::emu::dynamic_shared())
#define FISNET_SHARED(T, name, N)                                                                 \
  static ::emu::SharedArray name##_array{sizeof(T) * (N), alignof(T) < 16 ? 16 : alignof(T), 0, 0}; \
  T* const name = static_cast<T*>(::emu::static_shared(name##_array))
#define FISNET_UNROLL
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
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
#endif

// ---- launch: the same call in both worlds, no <<<>>> ------------------------------------------------
// Arguments become the kernel's parameter types here, so a wrong one is a compile error.
template <typename... P, typename... A>
inline cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream, A&&... args) {
#if defined(FISNET_EMU)
  return emu::launch(kernel, grid, block, smem, stream, static_cast<P>(args)...);
#else
  if (smem > kSureShared) {
    const void* const function = reinterpret_cast<const void*>(kernel);
    cudaFuncAttributes has;
    cudaError_t e = cudaFuncGetAttributes(&has, function);
    if (e == cudaSuccess && smem > static_cast<size_t>(has.maxDynamicSharedSizeBytes)) {
      // all that the device has, so that launches from other threads, of other sizes, never lower what this one needs
      int device = 0, most = 0;
      e = cudaGetDevice(&device);
      if (e == cudaSuccess) e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
      most -= static_cast<int>(has.sharedSizeBytes);
      if (e == cudaSuccess && smem > static_cast<size_t>(most)) e = cudaErrorInvalidValue;
      if (e == cudaSuccess) e = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
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
  emu::ldmatrix(r, row, 4, false);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
#if defined(FISNET_EMU)
  emu::ldmatrix(r, row, 4, true);
#else
  const uint32_t s = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}
template <typename T> struct MmaK16;   // d = a * b + d, m16n8k16, fp32 accumulators
template <> struct MmaK16<__nv_bfloat16> {
  static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FISNET_EMU)
    emu::mma<emu::Operand::bf16>(d, a, b, d);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};
template <> struct MmaK16<__half> {
  static __device__ __forceinline__ void run(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if defined(FISNET_EMU)
    emu::mma<emu::Operand::f16>(d, a, b, d);
#else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
  }
};
__device__ __forceinline__ void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {   // m16n8k8
#if defined(FISNET_EMU)
  emu::mma<emu::Operand::tf32>(d, a, b, d);
#else
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}
__device__ __forceinline__ uint32_t to_tf32(float x) {   // cvt.rna: to nearest, ties away from zero
#if defined(FISNET_EMU)
  uint32_t u = __float_as_uint(x);
  if ((u & 0x7f800000u) != 0x7f800000u) u += 0x1000u;
  return u & ~0x1fffu;
#else
  uint32_t u;
  asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(u) : "f"(x));
  return u;
#endif
}
}  // namespace fisnet
