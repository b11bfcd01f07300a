// One bug a kernel, beside the same kernel without it. The lines that the emulator must name end in "// culprit: <kernel>".
#include "unit.h"

namespace fisnet {
namespace {
__device__ __forceinline__ int tid() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int next_warp() { return static_cast<int>((threadIdx.x + 33) % blockDim.x); }

// ---- races in shared memory ----------------------------------------------------------------------------------------------
template <bool kBug> __global__ void missing_barrier(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];  // culprit: missing_barrier
  if (!kBug) __syncthreads();
  to<float>(p)[tid()] = s[next_warp()];  // culprit: missing_barrier
}
PLANTED(missing_barrier);

template <bool kBug> __global__ void write_after_read(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];
  __syncthreads();
  const float mine = s[next_warp()];  // culprit: write_after_read
  if (!kBug) __syncthreads();
  s[tid()] = mine + 1;  // culprit: write_after_read
  __syncthreads();
  to<float>(p)[tid()] = s[tid()];
}
PLANTED(write_after_read);

template <bool kBug> __global__ void write_after_write(UnitParams p) {
  FISNET_SHARED(float, s, 1);
  if (tid() == 0 || (kBug && tid() == 40)) s[0] = 1;  // culprit: write_after_write
  __syncthreads();
  to<float>(p)[tid()] = s[0];
}
PLANTED(write_after_write);

template <bool kBug> __global__ void warp_race(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];  // culprit: warp_race
  if (!kBug) __syncwarp();
  to<float>(p)[tid()] = s[tid() ^ 1];  // culprit: warp_race
}
PLANTED(warp_race);

// A shuffle exchanges registers; it says nothing about memory.
template <bool kBug> __global__ void shuffle_is_no_barrier(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];
  const float other = __shfl_xor_sync(0xffffffffu, s[tid()], 1);
  if (!kBug) __syncwarp();
  to<float>(p)[tid()] = s[tid() ^ 1] - other;
}
PLANTED(shuffle_is_no_barrier);

// __syncwarp of each half orders nothing between the halves.
template <bool kBug> __global__ void half_syncwarp(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];
  __syncwarp((tid() & 31) < 16 ? 0x0000ffffu : 0xffff0000u);
  to<float>(p)[tid()] = s[tid() ^ (kBug ? 16 : 8)];
}
PLANTED(half_syncwarp);

// A reader of one warp must not hide the reader of another.
template <bool kBug> __global__ void hidden_reader(UnitParams p) {
  FISNET_SHARED(float, s, 32);
  if (tid() < 32) s[tid()] = from<float>(p)[tid()];
  __syncthreads();
  float seen = tid() < 32 || tid() == 40 ? s[tid() % 32] : 0;
  __syncwarp();
  if (!kBug) __syncthreads();
  if (tid() < 32) seen += s[tid()], s[tid()] = 0;
  to<float>(p)[tid()] = seen;
}
PLANTED(hidden_reader);

template <bool kBug> __global__ void atomic_against_plain(UnitParams p) {
  FISNET_SHARED(int, count, 1);
  if (tid() == 0) count[0] = 0;
  __syncthreads();
  atomicAdd(count, 1);  // culprit: atomic_against_plain
  if (!kBug) __syncthreads();
  to<int>(p)[tid()] = count[0];  // culprit: atomic_against_plain
}
PLANTED(atomic_against_plain);

// The tree adds what other threads are still writing.
template <bool kBug> __global__ void tree_without_barrier(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];
  __syncthreads();
  for (int half = static_cast<int>(blockDim.x) / 2; half; half /= 2) {
    if (tid() < half) s[tid()] += s[tid() + half];
    if (!kBug) __syncthreads();
  }
  if (tid() == 0) to<float>(p)[0] = s[0];
}
PLANTED(tree_without_barrier);

// ---- cp.async ----------------------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void weak_wait(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  const int count = static_cast<int>(blockDim.x) * 4;
  cp_async16(s + 4 * tid(), from<float>(p) + 4 * tid(), true);
  cp_async_commit();
  cp_async16(s + count + 4 * tid(), from<float>(p) + 4 * tid(), tid() % 2 == 0);  // culprit: weak_wait
  cp_async_commit();
  cp_async_wait<kBug ? 1 : 0>();
  __syncthreads();
  to<float>(p)[tid()] = s[count + (tid() + 40) % count];  // culprit: weak_wait
}
PLANTED(weak_wait);

// Waiting shows a thread its own copies, not those of others.
template <bool kBug> __global__ void wait_without_barrier(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  cp_async16(s + 4 * tid(), from<float>(p) + 4 * tid(), true);
  cp_async_commit();
  cp_async_wait<0>();
  if (!kBug) __syncthreads();
  to<float>(p)[tid()] = s[4 * next_warp()];
}
PLANTED(wait_without_barrier);

// The next stage is fetched into memory that is still being read.
template <bool kBug> __global__ void early_fetch(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  cp_async16(s + 4 * tid(), from<float>(p) + 4 * tid(), true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  const float value = s[4 * next_warp()];
  if (!kBug) __syncthreads();
  cp_async16(s + 4 * tid(), from<float>(p) + 4 * tid(), true);
  cp_async_commit();
  cp_async_wait<0>();
  to<float>(p)[tid()] = value + s[4 * tid()];
}
PLANTED(early_fetch);

// ---- a warp's loads and stores of shared memory ---------------------------------------------------------------------------
template <bool kBug> __global__ void word_race(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  s[tid()] = from<float>(p)[tid()];  // culprit: word_race
  if (!kBug) __syncthreads();
  to<float>(p)[tid()] = __uint_as_float(lds32(s + next_warp()));  // culprit: word_race
}
PLANTED(word_race);

template <bool kBug> __global__ void vector_race(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  const uint32_t mine = __float_as_uint(from<float>(p)[tid()]), four[4] = {mine, mine, mine, mine};
  sts128(s + 4 * tid(), four);  // culprit: vector_race
  if (!kBug) __syncwarp();
  uint32_t r[4];
  lds128(r, s + 4 * (tid() ^ 1));  // culprit: vector_race
  to<float>(p)[tid()] = __uint_as_float(r[2]);
}
PLANTED(vector_race);

template <bool kBug> __global__ void vectors_to_one_place(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  const uint32_t four[4] = {};
  sts128(s + 4 * (kBug && tid() == 7 ? 6 : tid()), four);  // culprit: vectors_to_one_place
  __syncwarp();
  to<float>(p)[tid()] = s[4 * (kBug && tid() == 7 ? 6 : tid())];
}
PLANTED(vectors_to_one_place);

template <bool kBug> __global__ void word_of_a_copy(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  cp_async16(s + 4 * tid(), from<float>(p) + 4 * tid(), true);  // culprit: word_of_a_copy
  cp_async_commit();
  cp_async_wait<kBug ? 1 : 0>();
  __syncthreads();
  to<float>(p)[tid()] = __uint_as_float(lds32(s + 4 * tid() + 1));  // culprit: word_of_a_copy
}
PLANTED(word_of_a_copy);

template <bool kBug> __global__ void word_without_a_lane(UnitParams p) {
  FISNET_SHARED(float, s, 64);
  s[tid()] = from<float>(p)[tid()];
  to<float>(p)[tid()] = 0;
  if (kBug && tid() == 37) return;
  to<float>(p)[tid()] = __uint_as_float(lds32(s + tid()));
}
PLANTED(word_without_a_lane);

template <bool kBug> __global__ void vector_without_a_lane(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  for (int i = tid(); i < 256; i += 64) s[i] = 0;
  __syncthreads();
  uint32_t r[4] = {};
  if (!kBug || tid() != 37) lds128(r, s + 4 * tid());
  to<float>(p)[tid()] = __uint_as_float(r[0]);
}
PLANTED(vector_without_a_lane);

template <bool kBug> __global__ void store_without_a_lane(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  const uint32_t four[4] = {};
  if (kBug && tid() == 37) s[4 * tid()] = 0;
  else sts128(s + 4 * tid(), four);
  __syncthreads();
  to<float>(p)[tid()] = s[4 * tid()];
}
PLANTED(store_without_a_lane);

template <bool kBug> __global__ void word_beside_a_vector(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  for (int i = tid(); i < 256; i += 64) s[i] = 0;
  __syncthreads();
  uint32_t r[4] = {};
  if (kBug && tid() % 2) r[0] = lds32(s + 4 * tid());
  else lds128(r, s + 4 * tid());
  to<float>(p)[tid()] = __uint_as_float(r[0]);
}
PLANTED(word_beside_a_vector);

template <bool kBug> __global__ void word_of_global_memory(UnitParams p) {
  FISNET_SHARED(float, s, 64);
  s[tid()] = from<float>(p)[tid()];
  to<float>(p)[tid()] = __uint_as_float(lds32(kBug ? from<float>(p) + tid() : s + tid()));
}
PLANTED(word_of_global_memory);

template <bool kBug> __global__ void word_misaligned(UnitParams p) {
  FISNET_SHARED(float, s, 64);
  s[tid()] = 0;
  __syncwarp();
  to<float>(p)[tid()] = __uint_as_float(lds32(reinterpret_cast<const char*>(s + tid()) + (kBug ? 2 : 0)));  // culprit: word_misaligned
}
PLANTED(word_misaligned);

template <bool kBug> __global__ void word_past_the_end(UnitParams p) {
  FISNET_SHARED(float, s, 64);
  s[tid()] = 0;
  __syncthreads();
  to<float>(p)[tid()] = __uint_as_float(lds32(s + tid() + kBug));  // culprit: word_past_the_end
}
PLANTED(word_past_the_end);

// ---- bounds and alignment ------------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void read_past_the_end(UnitParams p) {
  to<float>(p)[tid()] = from<float>(p)[tid() + kBug];  // culprit: read_past_the_end
}
PLANTED(read_past_the_end);

template <bool kBug> __global__ void write_past_the_end(UnitParams p) {
  if (kBug || tid() < p.n) to<float>(p)[tid()] = from<float>(p)[tid() % p.n];  // culprit: write_past_the_end
}
PLANTED(write_past_the_end);

// A vector that starts inside and ends outside.
template <bool kBug> __global__ void vector_past_the_end(UnitParams p) {
  const int at = tid() * 4;
  float v[4];
  if (at + (kBug ? 1 : 4) <= p.n) {
    load<float, 4>(v, from<float>(p) + at);  // culprit: vector_past_the_end
    store<float, 4>(to<float>(p) + at, v);
  } else {
    for (int i = at; i < p.n; ++i) to<float>(p)[i] = from<float>(p)[i];
  }
}
PLANTED(vector_past_the_end);

// A loop that gcc would turn into memset.
template <bool kBug> __global__ void clear_past_the_end(UnitParams p) {
  for (int i = 0; i < p.n + kBug; ++i) to<float>(p)[i] = 0;  // culprit: clear_past_the_end
}
PLANTED(clear_past_the_end);

struct Large { float part[64]; };
template <bool kBug> __global__ void struct_past_the_end(UnitParams p) {
  to<Large>(p)[0] = from<Large>(p)[kBug];  // culprit: struct_past_the_end
}
PLANTED(struct_past_the_end);

// memcpy, which gcc does not tell the checker about by itself.
template <bool kBug> __global__ void copy_past_the_end(UnitParams p) {
  memcpy(to<float>(p), from<float>(p) + kBug, static_cast<size_t>(p.n));  // culprit: copy_past_the_end
}
PLANTED(copy_past_the_end);

template <bool kBug> __global__ void shared_past_the_end(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  s[tid() + kBug] = from<float>(p)[tid()];  // culprit: shared_past_the_end
  __syncthreads();
  to<float>(p)[tid()] = s[tid()];
}
PLANTED(shared_past_the_end);

// An instruction for global memory that gets an address in shared memory.
template <bool kBug> __global__ void global_store_to_shared(UnitParams p) {
  FISNET_SHARED(float, s, 256);
  const float x[4] = {1, 2, 3, 4};
  if (kBug) store<float, 4>(s + 4 * tid(), x); else store_shared<float, 4>(s + 4 * tid(), x);
  __syncthreads();
  to<float>(p)[tid()] = s[4 * tid()];
}
PLANTED(global_store_to_shared);

template <bool kBug> __global__ void shared_store_to_global(UnitParams p) {
  const float x[4] = {1, 2, 3, 4};
  if (kBug) store_shared<float, 4>(to<float>(p) + 4 * tid(), x); else store<float, 4>(to<float>(p) + 4 * tid(), x);
}
PLANTED(shared_store_to_global);

template <bool kBug> __global__ void array_past_the_end(UnitParams p) {
  FISNET_SHARED(float, first, 64);
  FISNET_SHARED(float, second, 64);
  first[tid()] = 1;
  second[tid()] = 2;
  if (kBug && tid() == 63) first[64] = 0;  // culprit: array_past_the_end
  __syncthreads();
  to<float>(p)[tid()] = first[tid()] + second[tid()];
}
PLANTED(array_past_the_end);

template <bool kBug> __global__ void write_to_input(UnitParams p) {
  float* const x = const_cast<float*>(from<float>(p));
  (kBug ? x : to<float>(p))[tid()] = 1;  // culprit: write_to_input
}
PLANTED(write_to_input);

template <bool kBug> __global__ void misaligned_vector(UnitParams p) {
  const float* const x = from<float>(p) + p.n;
  if (kBug || reinterpret_cast<uintptr_t>(x) % 16 == 0) {
    to<Pack<float>>(p)[tid()] = reinterpret_cast<const Pack<float>*>(x)[tid()];  // culprit: misaligned_vector
  } else {
    for (int i = 0; i < 4; ++i) to<float>(p)[4 * tid() + i] = x[4 * tid() + i];
  }
}
PLANTED(misaligned_vector);

// The address of a thread's own variable, given to another thread.
template <bool kBug> __global__ void local_of_another_thread(UnitParams p) {
  FISNET_SHARED(const float*, place, 32);
  volatile float mine = from<float>(p)[tid()];
  place[tid()] = const_cast<const float*>(&mine);
  __syncthreads();
  to<float>(p)[tid()] = *place[kBug ? tid() ^ 1 : tid()];  // culprit: local_of_another_thread
  __syncthreads();
}
PLANTED(local_of_another_thread);

// ---- global memory ---------------------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void overlapping_blocks(UnitParams p) {
  to<float>(p)[blockIdx.x * (blockDim.x - kBug) + threadIdx.x] = 1;  // culprit: overlapping_blocks
}
PLANTED(overlapping_blocks);

// Bytes of one word, written by different blocks.
template <bool kBug> __global__ void overlapping_bytes(UnitParams p) {
  to<uint8_t>(p)[blockIdx.x * (7 - kBug) + threadIdx.x] = static_cast<uint8_t>(blockIdx.x);  // culprit: overlapping_bytes
}
PLANTED(overlapping_bytes);

// Packs a bit a thread, a word a warp; with the bug the last word of a block is the next one's first.
template <bool kBug> __global__ void overlapping_words(UnitParams p) {
  const unsigned word = __ballot_sync(0xffffffffu, from<float>(p)[blockIdx.x * blockDim.x + threadIdx.x] > 0);
  if (threadIdx.x % 32 == 0) to<unsigned>(p)[blockIdx.x * (2 - kBug) + threadIdx.x / 32] = word;
}
PLANTED(overlapping_words);

template <bool kBug> __global__ void read_of_another_block(UnitParams p) {
  to<float>(p)[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  if (kBug) to<float>(p)[blockIdx.x * blockDim.x + threadIdx.x] += to<float>(p)[threadIdx.x + blockDim.x * (1 - blockIdx.x)];
}
PLANTED(read_of_another_block);

template <bool kBug> __global__ void global_without_barrier(UnitParams p) {
  float* const scratch = to<float>(p) + blockDim.x;
  scratch[tid()] = from<float>(p)[tid()];  // culprit: global_without_barrier
  if (!kBug) __syncthreads();
  to<float>(p)[tid()] = scratch[next_warp()];  // culprit: global_without_barrier
}
PLANTED(global_without_barrier);

// Atomics of all blocks, and a plain read by one of them.
template <bool kBug> __global__ void count_read_too_early(UnitParams p) {
  atomicAdd(to<unsigned>(p), 1);
  __syncthreads();
  if (kBug && blockIdx.x == 1 && tid() == 0) to<unsigned>(p)[1] = to<unsigned>(p)[0];
}
PLANTED(count_read_too_early);

template <bool kBug> __global__ void read_of_unwritten(UnitParams p) {
  float* const y = to<float>(p);
  if (!kBug) y[tid()] = 0;
  y[tid()] += from<float>(p)[tid()];  // culprit: read_of_unwritten
}
PLANTED(read_of_unwritten);

// ---- what shows in the result: NaN -------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void uninitialised_shared(UnitParams p) {
  FISNET_DYN_SMEM(float, s);
  FISNET_SHARED(float, t, 64);
  if (!kBug || tid() > 2) s[tid()] = t[tid()] = from<float>(p)[tid()];
  __syncthreads();
  to<float>(p)[tid()] = s[tid()] + t[tid()];
}
PLANTED(uninitialised_shared);

template <bool kBug> __global__ void unwritten_output(UnitParams p) {
  if (!kBug || tid() != 2) to<float>(p)[tid()] = from<float>(p)[tid()];
}
PLANTED(unwritten_output);

// ---- barriers and warps ---------------------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void divergent_barrier(UnitParams p) {
  if (kBug && tid() >= 40) {
    to<float>(p)[tid()] = 1;
    __syncthreads();
  } else {
    __syncthreads();
    to<float>(p)[tid()] = 1;
  }
}
PLANTED(divergent_barrier);

template <bool kBug> __global__ void deadlock(UnitParams p) {
  if (kBug && tid() & 1) __syncwarp();
  else __syncthreads();
  to<float>(p)[tid()] = 1;
}
PLANTED(deadlock);

template <bool kBug> __global__ void shuffle_from_inactive(UnitParams p) {
  float x = from<float>(p)[tid()];
  if (tid() % 32 < 16) x += __shfl_sync(0x0000ffffu, x, kBug ? 20 : 7);
  to<float>(p)[tid()] = x;
}
PLANTED(shuffle_from_inactive);

template <bool kBug> __global__ void shuffle_from_exited(UnitParams p) {
  to<float>(p)[tid()] = 0;
  if (kBug && tid() % 32 == 20) return;
  to<float>(p)[tid()] = __shfl_sync(0xffffffffu, from<float>(p)[tid()], 20);
}
PLANTED(shuffle_from_exited);

template <bool kBug> __global__ void lane_outside_of_mask(UnitParams p) {
  to<float>(p)[tid()] = __any_sync(kBug ? 0x0000ffffu : 0xffffffffu, tid() == 3);
}
PLANTED(lane_outside_of_mask);

template <bool kBug> __global__ void divergent_warp(UnitParams p) {
  float x = from<float>(p)[tid()];
  if (kBug && tid() % 2) x = __any_sync(0xffffffffu, 1);
  else x = __shfl_xor_sync(0xffffffffu, x, 1);
  to<float>(p)[tid()] = x;
}
PLANTED(divergent_warp);

// ---- tensor cores -------------------------------------------------------------------------------------------------------------------------
template <bool kBug> __global__ void unrounded_tf32(UnitParams p) {
  const float x = from<float>(p)[tid()];
  const uint32_t bits = kBug ? __float_as_uint(x) : to_tf32(x);
  const uint32_t a[4] = {bits, bits, bits, bits}, b[2] = {bits, bits};
  float d[4] = {};
  mma_tf32(d, a, b);
  to<float>(p)[tid()] = d[0];
}
PLANTED(unrounded_tf32);

template <bool kBug> __global__ void matrix_row_misaligned(UnitParams p) {
  FISNET_DYN_SMEM(__half, s);
  for (int i = tid(); i < 512; i += 32) s[i] = __float2half(1.f);
  __syncwarp();
  uint32_t r[4];
  ldmatrix_x4(r, s + 8 * tid() + (kBug ? 4 : 0));
  to<unsigned>(p)[tid()] = r[0];
}
PLANTED(matrix_row_misaligned);
}  // namespace
}  // namespace fisnet
