// What the emulator's files share. Never included by kernels, never instrumented.
#pragma once
#include <cstdint>
#include <exception>
#include <string>
#include <vector>

#include "device.h"

namespace emu {
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr size_t kStackBytes = 192 << 10;  // at least two thirds of it for use: see first_frame
constexpr size_t kStaticShared = 48 << 10;  // what CUDA allows

struct Copy {  // one cp.async
  char* to;
  const char* from;
  int bytes, from_bytes;  // the rest is zeros
  bool landed;
};

struct Thread {
  int id = 0;
  uint3 index{};
  int stack = -1;  // none before the thread starts
  void* sp = nullptr;
  bool done = false;
  const char* waits_for = nullptr;  // for the report of a deadlock
  const char* file = nullptr;
  int line = 0;
  std::vector<std::vector<Copy>> groups;  // committed
  std::vector<Copy> open;                 // not yet committed

  int warp() const { return id >> 5; }
  int lane() const { return id & 31; }
  uint32_t bit() const { return 1u << lane(); }
};

struct Arrival {  // a lane at a warp collective
  uint32_t mask;
  WarpOp op;
  void* arg;
  const char* what;
  bool orders_memory;
};

struct WarpAccess {  // to shared memory, by a load or store that all lanes must take part in
  const char* what;
  uint32_t lanes;  // that have been there
  uintptr_t at[kWarp];
};

struct Warp {
  int id = 0;
  uint32_t exists = 0, exited = 0, ready = 0, at_barrier = 0, arrived = 0;  // lanes
  uint64_t priority = 0;
  Arrival lane[kWarp];
  // Memory order between lanes: `now` counts the warp's __syncwarp; what lane j did before seen[i][j] is over for lane i.
  uint32_t now = 0;
  uint32_t seen[kWarp][kWarp] = {};
  std::vector<WarpAccess> accesses;  // since they were last complete; lane i comes to number next_access[i] next
  size_t next_access[kWarp] = {};
  std::vector<uintptr_t> copies[kWarp];  // where each lane's cp.async wrote since the last barrier, with kCommit between groups
};
constexpr uintptr_t kCommit = 0;

struct Slot {  // a FISNET_SHARED array of this launch, as bytes from the start of shared memory
  size_t offset, bytes;
};

struct Grid {  // the launch and the block that runs
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int size = 0;   // threads of a block
  int alive = 0;  // that have not returned
  uint32_t ready = 0;  // warps that have threads which can run
  Thread* current = nullptr;
  std::exception_ptr error;  // a block stops at its first error; the threads that it leaves behind never go on
  bool active = false;

  // The clock: one tick a block and a barrier, never set back. So whatever shadow memory says of older blocks and launches is
  // recognised by its age, and never needs clearing.
  uint32_t epoch = 0;
  uint32_t launch_start = 0, block_start = 0;
  std::vector<std::pair<uint32_t, uint3>> blocks;  // of this launch, with the epoch in which each began

  char* shared = nullptr;
  size_t dynamic_bytes = 0, static_start = 0, shared_bytes = 0;
  std::vector<Slot> slots;
  uint32_t launch_no = 0;
};
extern Grid grid;

// Kernel code is running and its accesses are to be checked. False inside the emulator: library functions that it shares with
// kernel files (templates, inline functions) may be there in their instrumented copy.
extern bool watching;
struct Inside {
  bool was = watching;
  Inside() { watching = false; }
  ~Inside() { watching = was; }
  Inside(const Inside&) = delete;
};

// scheduler.cpp
[[noreturn]] void abandon();          // leaves the block for good, grid.error says why
uintptr_t stack_of(int stack);        // its lowest address
uint64_t draw();                      // the next random number of the schedule
std::string triple(uint3 i);
std::string name_of(const Thread& t);
inline Warp& warp_of(const Thread& t) { return grid.warps[t.warp()]; }

// warp_access.cpp
void count_copies(Warp& w);           // bank conflicts of its cp.async since the last barrier
void finish_accesses(const Warp& w);  // fails if lanes are missing at one

// memory.cpp
void start_shared(size_t dynamic_bytes);
void start_checking(const void* call, size_t call_bytes);
void watch_stack(const Thread& t);
bool in_shared(const void* p, size_t bytes);
void mark_in_flight(const void* p, size_t bytes);  // a cp.async will write here
void mark_landed(const void* p, size_t bytes);     // its thread has waited for it
}  // namespace emu
