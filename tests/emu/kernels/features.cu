// What kernels may use, each against a plain formula in the test.
#include "unit.h"

namespace fisnet {
namespace {
__device__ __forceinline__ int tid() { return static_cast<int>(threadIdx.x); }
constexpr unsigned kAll = 0xffffffffu;

// y[6][32]: shuffles of x in the element type, in segments of 8 lanes in the last two rows.
template <typename T> __global__ void shuffles(UnitParams p) {
  const T x = from<T>(p)[tid()];
  T* const y = to<T>(p) + tid();
  y[0] = __shfl_sync(kAll, x, 5);
  y[32] = __shfl_xor_sync(kAll, x, 3);
  y[64] = __shfl_down_sync(kAll, x, 7);
  y[96] = __shfl_up_sync(kAll, x, 7);
  y[128] = __shfl_sync(kAll, x, 3, 8);
  y[160] = __shfl_down_sync(kAll, x, 2, 8);
}
FISNET_LAUNCHER(shuffles_float, launch_unit<shuffles<float>>);
FISNET_LAUNCHER(shuffles_double, launch_unit<shuffles<double>>);
FISNET_LAUNCHER(shuffles_int64, launch_unit<shuffles<long long>>);
FISNET_LAUNCHER(shuffles_uint32, launch_unit<shuffles<unsigned>>);
FISNET_LAUNCHER(shuffles_half, launch_unit<shuffles<__half>>);

// Votes of the whole warp, and of the two halves at the same time.
__global__ void votes(UnitParams p) {
  const bool x = from<int>(p)[tid()] > 0;
  const unsigned half = tid() < 16 ? 0x0000ffffu : 0xffff0000u;
  unsigned* const y = to<unsigned>(p) + tid();
  y[0] = __ballot_sync(kAll, x);
  y[32] = static_cast<unsigned>(__any_sync(kAll, x));
  y[64] = static_cast<unsigned>(__all_sync(kAll, x));
  if (tid() < 16) y[96] = __ballot_sync(half, x);
  else y[96] = __ballot_sync(half, x);
  y[128] = static_cast<unsigned>(__all_sync(half, x));
}
UNIT(votes);

// Barriers that count; y[3] a thread. Some threads have returned before.
__global__ void counting_barriers(UnitParams p) {
  if (tid() >= p.n) return;
  const int x = from<int>(p)[tid()];
  int* const y = to<int>(p) + 3 * tid();
  y[0] = __syncthreads_count(x);
  y[1] = __syncthreads_or(x > 5);
  y[2] = __syncthreads_and(x < 5);
}
UNIT(counting_barriers);

// y: old values summed, then the values left by each atomic. Every thread of every block works on the same words.
template <typename T> __global__ void global_atomics(UnitParams p) {
  T* const y = to<T>(p);
  const T x = from<T>(p)[blockIdx.x * blockDim.x + threadIdx.x];
  atomicAdd(y, 1);
  atomicMax(y + 1, x);
  atomicMin(y + 2, x);
  atomicOr(y + 3, x);
  atomicAnd(y + 4, x);
  atomicExch(y + 5, T(7));
  atomicCAS(y + 6, T(0), T(9));
}
FISNET_LAUNCHER(global_atomics_int, launch_unit<global_atomics<int>>);
FISNET_LAUNCHER(global_atomics_uint, launch_unit<global_atomics<unsigned>>);
FISNET_LAUNCHER(global_atomics_uint64, launch_unit<global_atomics<unsigned long long>>);

// A histogram of x in shared memory.
__global__ void histogram(UnitParams p) {
  FISNET_SHARED(int, count, 16);
  if (tid() < 16) count[tid()] = 0;
  __syncthreads();
  for (int i = tid(); i < p.n; i += static_cast<int>(blockDim.x)) atomicAdd(&count[from<int>(p)[i]], 1);
  __syncthreads();
  if (tid() < 16) to<int>(p)[tid()] = count[tid()];
}
UNIT(histogram);

// y[10] a thread
__global__ void bit_tricks(UnitParams p) {
  const unsigned x = __ldg(from<unsigned>(p) + tid());
  const unsigned long long wide = static_cast<unsigned long long>(x) << 20;
  long long* const y = to<long long>(p) + 10 * tid();
  y[0] = __popc(x);
  y[1] = __ffs(static_cast<int>(x));
  y[2] = __clz(static_cast<int>(x));
  y[3] = __brev(x);
  y[4] = __popcll(wide);
  y[5] = __ffsll(static_cast<long long>(wide));
  y[6] = __clzll(static_cast<long long>(wide));
  y[7] = static_cast<long long>(__brevll(wide));
  y[8] = __float_as_int(__uint_as_float(x));
  y[9] = __double_as_longlong(__longlong_as_double(static_cast<long long>(wide)));
}
UNIT(bit_tricks);

// y[8] a thread, for positive x
template <typename T> __global__ void functions(UnitParams p) {
  const T x = from<T>(p)[tid()];
  T* const y = to<T>(p) + 8 * tid();
  y[0] = rsqrt(x);
  y[1] = exp2(x);
  y[2] = log1p(x);
  y[3] = pow(x, T(1.5));
  y[4] = fmax(fmin(x, T(1)), T(0.5));
  y[5] = log2(x);
  y[6] = fma(x, x, T(1));
  y[7] = copysign(sqrt(fabs(x)), -x);
}
FISNET_LAUNCHER(functions_float, launch_unit<functions<float>>);
FISNET_LAUNCHER(functions_double, launch_unit<functions<double>>);

// The names with an f at the end; y[7] a thread
__global__ void float_functions(UnitParams p) {
  const float x = from<float>(p)[tid()];
  float* const y = to<float>(p) + 7 * tid();
  y[0] = rsqrtf(x);
  y[1] = exp2f(x);
  y[2] = log1pf(x);
  y[3] = powf(x, 1.5f);
  y[4] = fmaxf(fminf(x, 1.f), 0.5f);
  y[5] = fmaf(x, x, 1.f);
  y[6] = __fmul_rn(x, x);
}
UNIT(float_functions);

// CUDA's min and max: mixed types, and the number out of a number and a NaN. y[8]
__global__ void min_and_max(UnitParams p) {
  double* const y = to<double>(p);
  const float nan = from<float>(p)[0];
  y[0] = min(-1, 2u);                 // unsigned
  y[1] = static_cast<double>(max(-1LL, 2LL));
  y[2] = min(1.5f, 2.5);              // double
  y[3] = max(nan, 1.f);
  y[4] = min(1.f, nan);
  y[5] = min(3, -4);
  y[6] = max(7u, 5u);
  y[7] = max(nan, nan);
}
UNIT(min_and_max);

// Rounding to nearest even, and back; y[4] a thread
__global__ void conversions(UnitParams p) {
  const float x = from<float>(p)[tid()];
  float* const y = to<float>(p) + 4 * tid();
  y[0] = __bfloat162float(__float2bfloat16_rn(x));
  y[1] = __half2float(__float2half_rn(x));
  y[2] = __bfloat162float(__float2bfloat16(x));
  y[3] = __uint_as_float(to_tf32(x));
}
UNIT(conversions);

// Which thread am I: a grid and a block of three dimensions
__global__ void indices(UnitParams p) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  __syncthreads();
  const unsigned first = __shfl_sync(kAll, thread, 0);  // lanes count x fastest
  to<int>(p)[at] = static_cast<int>(thread - first == thread % 32 ? at : 0u);
}
UNIT(indices);

// Reverses n floats in dynamic shared memory, of whatever size
__global__ void reverse_in_shared(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  for (int i = tid(); i < p.n; i += static_cast<int>(blockDim.x)) s[i] = from<float>(p)[i];
  __syncthreads();
  for (int i = tid(); i < p.n; i += static_cast<int>(blockDim.x)) to<float>(p)[i] = s[p.n - 1 - i];
}
UNIT(reverse_in_shared);

// Shared arrays in a device function, one for every instantiation, of 16-byte elements too; and in a loop of calls
template <typename T, int kWidth> __device__ T block_sum(T x) {
  FISNET_SHARED(Pack<T>, part, kWidth);
  Pack<T> mine{};
  mine.part[0] = x;
  part[tid()] = mine;
  __syncthreads();
  T sum = 0;
  FISNET_UNROLL
  for (int i = 0; i < kWidth; ++i) sum += part[i].part[0];
  __syncthreads();
  return sum;
}
__global__ void __launch_bounds__(64) shared_in_functions(UnitParams p) {
  FISNET_SHARED(float4, v, 64);
  const float* __restrict__ const x = from<float>(p);
  v[tid()] = make_float4(x[tid()], 0.f, 0.f, 1.f);
  double total = 0;
#pragma unroll 1
  for (int i = 0; i < 3; ++i) total += block_sum<double, 64>(v[tid()].x) + static_cast<double>(block_sum<float, 64>(v[tid()].w));
  to<double>(p)[tid()] = total;
}
UNIT(shared_in_functions);

// 40 KB of static shared memory a kernel: many such kernels in one library must not add up
template <int kNumber> __global__ void large_static(UnitParams p) {
  FISNET_SHARED(float, s, 10240);
  for (int i = tid(); i < 10240; i += static_cast<int>(blockDim.x)) s[i] = kNumber;
  __syncthreads();
  to<float>(p)[tid()] = s[10239 - tid()];
}
FISNET_LAUNCHER(large_static_1, launch_unit<large_static<1>>);
FISNET_LAUNCHER(large_static_2, launch_unit<large_static<2>>);

#if defined(FISNET_EMU)  // ptxas refuses it
__global__ void too_much_static(UnitParams p) {
  FISNET_SHARED(float, s, 12289);
  s[tid()] = 1;
  to<float>(p)[tid()] = s[tid()];
}
UNIT(too_much_static);
#endif

// Warps that run ahead of each other: 20 rounds of a token passed from warp to warp
__global__ void many_rounds(UnitParams p) {
  FISNET_SHARED(int, token, 32);
  const int warp = tid() / 32, warps = static_cast<int>(blockDim.x) / 32;
  if (tid() < 32) token[tid()] = 0;
  __syncthreads();
  for (int round = 0; round < 20; ++round) {
    if (round % warps == warp && tid() % 32 == 0) token[warp] += round;
    __syncthreads();
  }
  int sum = tid() < warps ? token[tid()] : 0;
  for (int by = 16; by; by /= 2) sum += __shfl_xor_sync(kAll, sum, by);
  if (tid() == 0) to<int>(p)[0] = sum;
}
UNIT(many_rounds);

// The order in which warps and blocks come, which must not show in results and here does. Atomics make it legal.
__global__ void order_of_threads(UnitParams p) {
  const unsigned turn = atomicAdd(to<unsigned>(p), 1u);
  to<unsigned>(p)[1 + turn] = blockIdx.x * blockDim.x + threadIdx.x;
}
UNIT(order_of_threads);

// ---- a warp's accesses to shared memory: x says where each lane's is -----------------------------------------------------
__global__ void words_4(UnitParams p) {
  FISNET_DYN_SMEM(uint32_t, s);
  for (int i = tid(); i < p.n; i += 32) s[i] = static_cast<uint32_t>(i);
  __syncwarp();
  to<uint32_t>(p)[tid()] = lds32(s + from<int>(p)[tid()]);
}
UNIT(words_4);

// s[i] holds 4 i, 4 i + 1, ...; y[4] a thread
__global__ void words_16(UnitParams p) {
  FISNET_DYN_SMEM(uint4, s);
  for (unsigned i = threadIdx.x; i < static_cast<unsigned>(p.n); i += 32) s[i] = make_uint4(4 * i, 4 * i + 1, 4 * i + 2, 4 * i + 3);
  __syncwarp();
  uint32_t r[4];
  lds128(r, s + from<int>(p)[tid()]);
  for (int i = 0; i < 4; ++i) to<uint32_t>(p)[4 * tid() + i] = r[i];
}
UNIT(words_16);

// y[4] a thread: what it stored
__global__ void stores_16(UnitParams p) {
  FISNET_DYN_SMEM(uint32_t, s);
  const uint32_t first = 4 * threadIdx.x, mine[4] = {first, first + 1, first + 2, first + 3};
  uint32_t* const at = s + 4 * from<int>(p)[tid()];
  sts128(at, mine);
  for (int i = 0; i < 4; ++i) to<uint32_t>(p)[4 * tid() + i] = at[i];
}
UNIT(stores_16);

// n copies a lane, to where x [n][threads] says; -1: no copy. A commit after each but the first, so the first two are a group. All are
// zeros but those of lane 0.
__global__ void copies(UnitParams p) {
  FISNET_DYN_SMEM(uint4, s);
  const int threads = static_cast<int>(blockDim.x);
  for (int i = 0; i < p.n; ++i) {
    const int at = from<int>(p)[i * threads + tid()];
    if (at >= 0) cp_async16(s + at, p.x, tid() == 0);
    if (i) cp_async_commit();
  }
  cp_async_wait<0>();
  to<int>(p)[tid()] = 0;
}
UNIT(copies);

// ---- tensor cores: one warp, d [16, 8] = a [16, K] b [K, 8], row-major ---------------------------------------------------
// x holds a, then b. The rows of a have `n` elements of padding in shared memory.
template <typename T> __global__ void product16(UnitParams p) {
  FISNET_DYN_SMEM(T, s);
  const int l = tid(), row_a = 16 + p.n, row_b = 8;
  T* const b_at = s + 16 * row_a;
  for (int i = l; i < 32; i += 32) cp_async16(s + (i / 2) * row_a + 8 * (i % 2), from<T>(p) + 8 * i, true);
  if (l < 16) cp_async16(b_at + l * row_b, from<T>(p) + 256 + 8 * l, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  uint32_t a[4], b[4];
  ldmatrix_x4(a, s + (l & 15) * row_a + (l >> 4) * 8);
  ldmatrix_x4_trans(b, b_at + (l & 15) * row_b);  // lanes 16 to 31 repeat: b[2] and b[3] are not used
  float d[4] = {};
  const uint32_t b2[2] = {b[0], b[1]};
  MmaK16<T>::run(d, a, b2);
  for (int i = 0; i < 4; ++i) to<float>(p)[((l >> 2) + 8 * (i >> 1)) * 8 + 2 * (l & 3) + (i & 1)] = d[i];
}
FISNET_LAUNCHER(product_bf16, launch_unit<product16<__nv_bfloat16>>);
FISNET_LAUNCHER(product_f16, launch_unit<product16<__half>>);

// 2 x 3 products at once, their left operands by one call of ldmatrix: d [32, 24] = a [32, K] b [K, 24]. x holds a, then b
// transposed, both in T; in shared memory rows have 16 bytes of padding.
template <typename T> __global__ void tiles(UnitParams p) {
  FISNET_DYN_SMEM(T, s);
  constexpr int kDepth = sizeof(T) == 2 ? 16 : 8, kPitch = kDepth + 16 / static_cast<int>(sizeof(T));
  const int l = tid(), group = l >> 2, t = l & 3;
  for (int i = l; i < (32 + 24) * kDepth; i += 32) {
    if constexpr (sizeof(T) == 2) s[i / kDepth * kPitch + i % kDepth] = from<T>(p)[i];
    else s[i / kDepth * kPitch + i % kDepth] = __uint_as_float(to_tf32(from<T>(p)[i]));
  }
  __syncwarp();
  uint32_t a[2][4], b[3][2];
  const void* const rows[2] = {s + (l & 15) * kPitch + (l >> 4) * (kDepth / 2), s + (16 + (l & 15)) * kPitch + (l >> 4) * (kDepth / 2)};
  ldmatrix_x4(a, rows);  // to it, a float is two elements
  for (int n = 0; n < 3; ++n)
    for (int i = 0; i < 2; ++i) b[n][i] = lds32(s + (32 + 8 * n + group) * kPitch + (kDepth / 8) * t + i * kDepth / 2);
  float d[2][3][4] = {};
  mma_tiles<T>(d, a, b);
  for (int m = 0; m < 2; ++m)
    for (int n = 0; n < 3; ++n)
      for (int i = 0; i < 4; ++i) to<float>(p)[(16 * m + group + 8 * (i >> 1)) * 24 + 8 * n + 2 * t + (i & 1)] = d[m][n][i];
}
FISNET_LAUNCHER(tiles_bf16, launch_unit<tiles<__nv_bfloat16>>);
FISNET_LAUNCHER(tiles_f16, launch_unit<tiles<__half>>);
FISNET_LAUNCHER(tiles_tf32, launch_unit<tiles<float>>);

__global__ void product_tf32(UnitParams p) {
  const int l = tid(), group = l >> 2, t = l & 3;
  const float* const x = from<float>(p);
  uint32_t a[4], b[2];
  float d[4] = {};
  for (int i = 0; i < 4; ++i) a[i] = to_tf32(x[(group + 8 * (i & 1)) * 8 + t + 4 * (i >> 1)]);
  for (int i = 0; i < 2; ++i) b[i] = to_tf32(x[128 + (t + 4 * i) * 8 + group]);
  mma_tf32(d, a, b);
  for (int i = 0; i < 4; ++i) to<float>(p)[(group + 8 * (i >> 1)) * 8 + 2 * t + (i & 1)] = d[i];
}
UNIT(product_tf32);
}  // namespace
}  // namespace fisnet
