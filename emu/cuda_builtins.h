// CUDA's own names, for kernel files that g++ compiles. Only what is exact is here: fast-math intrinsics (__expf, __fdividef,
// ...) are missing on purpose, so that a kernel that uses one does not compile.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>
#include <vector_functions.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "device.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define __shared__ static_assert(false, "use FISNET_SHARED or FISNET_DYN_SMEM");

// The compiler does not show calls of these two: kernel files call the emulator's own.
extern "C" void* memcpy(void* to, const void* from, size_t bytes) noexcept __asm__("fisnet_emu_memcpy");
extern "C" void* memset(void* to, int value, size_t bytes) noexcept __asm__("fisnet_emu_memset");

constexpr int warpSize = 32;

// ---- the block -------------------------------------------------------------------------------------------------------
#define EMU_BARRIER(predicate) ::emu::barrier(predicate, __FILE__, __LINE__, __COUNTER__)
#define __syncthreads() static_cast<void>(EMU_BARRIER(false))
#define __syncthreads_count(predicate) EMU_BARRIER((predicate) != 0)
#define __syncthreads_or(predicate) static_cast<int>(EMU_BARRIER((predicate) != 0) != 0)
#define __syncthreads_and(predicate) static_cast<int>(EMU_BARRIER((predicate) == 0) == 0)
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- the warp --------------------------------------------------------------------------------------------------------
namespace emu {
template <typename T> struct Shuffle {
  T in, out;
  int from;
};
template <typename T> EMU_UNSEEN void exchange(void* const* args, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!has_lane(mask, lane)) continue;
    auto* me = static_cast<Shuffle<T>*>(args[lane]);
    if (!has_lane(mask, me->from))
      fail("shuffle: lane " + std::to_string(lane) + " reads lane " + std::to_string(me->from) + ", which takes no part");
    me->out = static_cast<Shuffle<T>*>(args[me->from])->in;
  }
}
template <typename T> EMU_UNSEEN T shuffle(uint32_t mask, T value, int from, int width) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8),
                "CUDA shuffles 16, 32 and 64-bit types");
  if (width < 1 || width > 32 || (width & (width - 1))) fail("shuffle: the width must be a power of two, got " + std::to_string(width));
  Shuffle<T> s{value, value, from};
  collective(mask, &exchange<T>, &s, "shuffle", false);
  return s.out;
}

struct Vote {
  uint32_t value, result;
};
EMU_UNSEEN inline void ballot(void* const* args, uint32_t mask) {
  uint32_t result = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (has_lane(mask, lane) && static_cast<Vote*>(args[lane])->value) result |= 1u << lane;
  for (int lane = 0; lane < 32; ++lane)
    if (has_lane(mask, lane)) static_cast<Vote*>(args[lane])->result = result;
}
EMU_UNSEEN inline void nothing(void* const*, uint32_t) {}
EMU_UNSEEN inline uint32_t vote(uint32_t mask, bool value) {
  Vote v{value, 0};
  collective(mask, &ballot, &v, "vote", false);
  return v.result;
}
}  // namespace emu

// A lane outside of its segment of `width` lanes is not read: the caller keeps its own value.
template <typename T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
  const int lane = static_cast<int>(emu::lane_id());
  return emu::shuffle(mask, value, (lane & ~(width - 1)) | (from & (width - 1)), width);
}
template <typename T> T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  const int lane = static_cast<int>(emu::lane_id()), from = lane ^ lanes;
  return emu::shuffle(mask, value, from < (lane & ~(width - 1)) + width ? from : lane, width);
}
template <typename T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = static_cast<int>(emu::lane_id());
  return emu::shuffle(mask, value, (lane & (width - 1)) + static_cast<int>(by) < width ? lane + static_cast<int>(by) : lane, width);
}
template <typename T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = static_cast<int>(emu::lane_id());
  return emu::shuffle(mask, value, (lane & (width - 1)) >= static_cast<int>(by) ? lane - static_cast<int>(by) : lane, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0); }
inline int __any_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate != 0) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return emu::vote(mask, predicate == 0) == 0; }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emu::collective(mask, &emu::nothing, nullptr, "__syncwarp", true); }
unsigned __activemask() = delete;  // its result depends on timing

// ---- atomics -----------------------------------------------------------------------------------------------------------
// Relaxed, as on a GPU: they do not race with each other, and order nothing else. No thread runs beside this one, so plain
// accesses will do. `U` keeps the value out of deduction, as CUDA's overloads do: atomicAdd(&unsigned_counter, 1).
namespace emu {
template <typename T> struct NotDeduced { using type = T; };
template <typename T, typename F> EMU_UNSEEN T atomic(T* p, F change) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA's atomics have 32 or 64 bits");
  touch(p, sizeof(T), Access::atomic, __builtin_return_address(0));
  const T old = *p;
  *p = change(old);
  return old;
}
}  // namespace emu
#define EMU_ATOMIC(name, result) \
  template <typename T> inline T name(T* p, typename emu::NotDeduced<T>::type value) { \
    return emu::atomic(p, [value](T old) { return static_cast<T>(result); }); \
  }
EMU_ATOMIC(atomicAdd, old + value)
EMU_ATOMIC(atomicSub, old - value)
EMU_ATOMIC(atomicMin, value < old ? value : old)
EMU_ATOMIC(atomicMax, value > old ? value : old)
EMU_ATOMIC(atomicAnd, old & value)
EMU_ATOMIC(atomicOr, old | value)
EMU_ATOMIC(atomicXor, old ^ value)
EMU_ATOMIC(atomicExch, (static_cast<void>(old), value))
EMU_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
EMU_ATOMIC(atomicDec, old == 0 || old > value ? value : old - 1)
#undef EMU_ATOMIC
template <typename T> inline T atomicCAS(T* p, typename emu::NotDeduced<T>::type expected, typename emu::NotDeduced<T>::type value) {
  return emu::atomic(p, [=](T old) { return old == expected ? value : old; });
}

// ---- loads and stores with a hint to the cache ---------------------------------------------------------------------------
template <typename T> inline T __ldg(const T* p) { return *p; }
template <typename T> inline T __ldcg(const T* p) { return *p; }
template <typename T> inline T __ldcs(const T* p) { return *p; }
template <typename T> inline void __stcg(T* p, typename emu::NotDeduced<T>::type value) { *p = value; }
template <typename T> inline void __stcs(T* p, typename emu::NotDeduced<T>::type value) { *p = value; }

// ---- arithmetic ------------------------------------------------------------------------------------------------------------
// min and max take mixed types, and of a number and a NaN they return the number.
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return y < x || x != x ? y : x;
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  const T x = static_cast<T>(a), y = static_cast<T>(b);
  return y > x || x != x ? y : x;
}
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
inline float rsqrt(float x) { return 1.f / std::sqrt(x); }
inline double rsqrt(double x) { return 1. / std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }

// ---- bits --------------------------------------------------------------------------------------------------------------------
namespace emu {
template <typename To, typename From> inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &x, sizeof to);
  return to;
}
}  // namespace emu
inline int __float_as_int(float x) { return emu::bits<int>(x); }
inline unsigned __float_as_uint(float x) { return emu::bits<unsigned>(x); }
inline float __int_as_float(int x) { return emu::bits<float>(x); }
inline float __uint_as_float(unsigned x) { return emu::bits<float>(x); }
inline long long __double_as_longlong(double x) { return emu::bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emu::bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 | __brev(static_cast<unsigned>(x >> 32));
}
