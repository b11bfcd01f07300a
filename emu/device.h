// What the device-side headers ask of the emulator. Functions marked EMU_UNSEEN are compiled into kernel files but belong to
// the emulator: their accesses are not the kernel's.
#pragma once
#include "cuda_emu.h"

// noinline, because gcc would otherwise inline them into code that is instrumented.
#define EMU_UNSEEN __attribute__((no_sanitize("thread"), noinline))

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emu {
enum class Access { read, write, atomic };

[[noreturn]] void fail(const std::string& message);
void touch(const void* p, size_t bytes, Access access, const void* pc);  // an access that the compiler's call-outs do not show
void check_space(const void* p, bool shared);  // of an instruction that is for shared memory, or for all but shared memory

// ---- shared memory ---------------------------------------------------------------------------------------------------
struct SharedArray {  // one FISNET_SHARED, known by its address
  size_t bytes, align;
  uint32_t launch_no;  // of the launch that `offset` holds for
  size_t offset;
};
void* dynamic_shared();
void* static_shared(SharedArray& array);

// ---- the block -------------------------------------------------------------------------------------------------------
// `site` tells barriers apart. Returns for how many threads `predicate` holds.
int barrier(bool predicate, const char* file, int line, int site);

// ---- the warp --------------------------------------------------------------------------------------------------------
unsigned lane_id();
inline bool has_lane(uint32_t mask, int lane) { return mask >> lane & 1; }
// Every lane in `mask` leaves `arg`; the last one to come runs op(args, mask of those that have not exited) for all.
using WarpOp = void (*)(void* const* args, uint32_t mask);
void collective(uint32_t mask, WarpOp op, void* arg, const char* what, bool orders_memory);

// ---- shared memory, by warps: all 32 lanes must be there, and bank conflicts are counted -------------------------------
// `loads` times ldmatrix.x4: out[i] from rows[i], where lane 8 j + r gives row r of the 8 x 8 matrix j.
void ldmatrix(uint32_t (*out)[4], const void* const* rows, int loads, bool transposed);
uint32_t lds32(const void* at);
void lds128(uint32_t* out, const void* at);
void sts128(void* at, const uint32_t* from);

// ---- tensor cores --------------------------------------------------------------------------------------------------------
enum class Operand { bf16, f16, tf32 };
// d[m][n] += a[m] b[n], m < `down` and n < `across`.
template <Operand> void mma(float (*d)[4], const uint32_t (*a)[4], const uint32_t (*b)[2], int down, int across);

// ---- cp.async ----------------------------------------------------------------------------------------------------------
void cp_async(void* to, const void* from, int bytes, int from_bytes);
void cp_async_commit();
void cp_async_wait(int groups_left);
}  // namespace emu
