// CUDA on the CPU, for tests: runs kernel source that g++ compiled. This header is what the outside sees: settings, what
// memory a kernel may touch, and the launch. device/portable.cuh adds the names that kernels use
// (cuda_builtins.h).
//
// Blocks run one after another; the threads of a block are fibers (scheduler.cpp), each of which runs until it reaches a
// barrier or a warp collective. Which one runs next is the schedule: it depends on nothing but Options, so every failure
// can be repeated. Kernel files are compiled with -fsanitize=thread and the emulator answers the compiler's call-outs
// itself (memory.cpp), which is how it sees every access.
//
// It says nothing about time, occupancy, coalescing, or the rounding inside tensor cores. Not modelled: clusters, mbarrier,
// TMA, wgmma, and results that on a GPU depend on timing (__activemask, spinning on memory).
#pragma once
#include <cuda_runtime_api.h>  // dim3, cudaError_t: types only, nothing of the runtime is called

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emu {
enum class Order {
  in_order,  // of the threads that can run, the first: warp 0 is as far ahead as it can be
  reversed,  // the last; blocks run backwards too
  random     // by the seed: some warps run far ahead of others; blocks in random order
};

struct Options {
  Order order = Order::in_order;
  uint64_t seed = 1;
  bool async_random = false;  // a cp.async lands at once or at its wait, by coin flip; else at its wait
  bool check_races = false;   // shared memory: two threads, one of which writes, with no barrier between
  bool check_bounds = false;  // accesses outside of shared memory, buffers that were allowed, and the thread's own variables
  bool check_global = false;  // writable buffers: the same as races, and blocks that touch what another one writes
  bool strict_tf32 = true;    // operands of a tf32 product must have been rounded to tf32
  uint8_t poison = 0xff;      // fills shared memory when a block starts: NaN in every float type
  size_t max_shared = 163 << 10;  // bytes a block may have: an A100's, the least of the GPUs that we build machine code for
};

// Since somebody set it back. Conflicts are the times that a warp's access to shared memory waits for its own bank: the different
// words (of 4 bytes, or of 16) in its busiest bank, less one. Those of plain loads and stores are not counted.
struct Stats {
  uint64_t blocks, threads, switches, barriers, mma;
  uint64_t ldmatrix, ldmatrix_conflicts;      // a warp's
  uint64_t smem_loads, smem_load_conflicts;   // a warp's lds32 and lds128
  uint64_t smem_stores, smem_store_conflicts;  // a warp's sts128
  uint64_t cp_async, cp_async_conflicts;      // a thread's
  uint64_t cp_async_uncounted;                // those of lanes whose neighbours copied other numbers of times: see count_copies
};
constexpr std::pair<const char*, uint64_t Stats::*> kStatNames[] = {
    {"blocks", &Stats::blocks}, {"threads", &Stats::threads}, {"switches", &Stats::switches}, {"barriers", &Stats::barriers},
    {"mma", &Stats::mma}, {"ldmatrix", &Stats::ldmatrix}, {"ldmatrix_conflicts", &Stats::ldmatrix_conflicts},
    {"smem_loads", &Stats::smem_loads}, {"smem_load_conflicts", &Stats::smem_load_conflicts},
    {"smem_stores", &Stats::smem_stores}, {"smem_store_conflicts", &Stats::smem_store_conflicts},
    {"cp_async", &Stats::cp_async}, {"cp_async_conflicts", &Stats::cp_async_conflicts}, {"cp_async_uncounted", &Stats::cp_async_uncounted}};

extern Options opt;
extern Stats stats;

// What a check found. `what()` names block, thread and the places of both accesses as [file+0xoffset], for addr2line.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// A buffer that the next launches may read, and write if writable. The name appears in errors. The buffer of an output
// should hold 0xff bytes: reading such bytes before a kernel has written them is an error.
void allow(const void* p, size_t bytes, bool writable, const char* name = "");
void clear_allowed();

// One call of a kernel: its parameters are copied for every thread, as on a GPU.
template <typename... P> struct Call {
  static_assert((std::is_trivially_copyable_v<P> && ...), "kernel parameters are copied byte by byte");
  void (*kernel)(P...);
  std::tuple<P...> parameters;

  static void run(const void* self) {
    const Call& call = *static_cast<const Call*>(self);
    std::apply(call.kernel, call.parameters);
  }
};

cudaError_t run_grid(dim3 grid, dim3 block, size_t dynamic_shared, void (*run)(const void*), const void* call, size_t call_bytes);

// Runs the whole grid before it returns. A shape that a GPU would refuse is a cudaError_t; what the checks find is an Error.
template <typename... P, typename... A>
cudaError_t launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t dynamic_shared, cudaStream_t, A&&... args) {
  const Call<P...> call{kernel, std::tuple<P...>(std::forward<A>(args)...)};
  return run_grid(grid, block, dynamic_shared, &Call<P...>::run, &call, sizeof call);
}
}  // namespace emu
