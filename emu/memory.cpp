// Shared memory, and the checks of every access: bounds, alignment, races, conflicts between blocks.
#include <link.h>

#include <cstdio>
#include <cstring>
#include <memory>

#include "internal.h"

namespace emu {
namespace {
// ---- what is remembered of memory ----------------------------------------------------------------------------------------
constexpr int kSeveral = -1;  // threads of more than one warp

// The last accesses of one kind: who, and when. Threads are lanes of one warp; those of several warps need no telling apart,
// because only a barrier orders them, and a barrier orders all.
struct Record {
  uint32_t epoch = 0;  // of the last one; 0 for none
  uint32_t first = 0;  // of the first one in this launch
  uint32_t lanes = 0;
  uint32_t stamp = 0;  // the warp's `now`
  int16_t warp = 0;
  bool atomic = false, in_flight = false;
  uint32_t pc = 0;     // offset in this library
};
struct Cell {
  Record write, read;
};

// The cells of one range of memory. A cell covers `granule` bytes: 16 until an access is smaller than that, then as many
// as the smallest access has, so that memory touched by vectors costs little and bytes are told apart where it matters.
class Shadow {
 public:
  void cover(const void* p, size_t bytes) {
    origin_ = reinterpret_cast<uintptr_t>(p) & ~uintptr_t{15};
    bytes_ = reinterpret_cast<uintptr_t>(p) + bytes - origin_;
    granule_ = 16;
    cells_.resize(count());
  }
  void grow(size_t bytes) {
    bytes_ = bytes;
    if (cells_.size() < count()) cells_.resize(count());
  }
  template <typename F> void each(uintptr_t at, size_t bytes, F&& f) {
    if ((at | bytes) & (granule_ - 1)) refine(at | bytes);
    Cell* cell = &cells_[(at - origin_) / granule_];
    for (size_t done = 0; done < bytes; done += granule_) f(*cell++);
  }

 private:
  size_t count() const { return (bytes_ + granule_ - 1) / granule_; }
  void refine(uintptr_t bits) {
    const size_t before = count(), old = granule_;
    while (bits & (granule_ - 1)) granule_ /= 2;
    const size_t parts = old / granule_;
    cells_.resize(before * parts);
    for (size_t i = before; i-- > 0;) {
      const Cell cell = cells_[i];
      for (size_t k = 0; k < parts; ++k) cells_[i * parts + k] = cell;
    }
  }

  uintptr_t origin_ = 0;
  size_t bytes_ = 0, granule_ = 16;
  std::vector<Cell> cells_;
};

struct Buffer {
  uintptr_t begin = 0, end = 0;
  bool writable = false;
  uint32_t since = 0;  // epoch in which it was allowed: older writes are not the kernels'
  std::string name;
  Shadow shadow;

  bool holds(uintptr_t at, size_t bytes) const { return at >= begin && at + bytes <= end; }
};
std::vector<Buffer> buffers;  // the first `allowed` are in use; the rest keep their memory
size_t allowed = 0;
size_t last_hit = 0;

struct Range {
  uintptr_t begin = 0;
  size_t bytes = 0;
  bool holds(uintptr_t at) const { return at - begin < bytes; }
};
Range library;     // kernels, their constants and globals (threadIdx): the object that this file is linked into
Range parameters;  // of the call
Range own_stack;   // of the running thread
std::string library_name;

Shadow shared_shadow;
std::unique_ptr<char[]> shared_storage;
size_t shared_capacity = 0;

uintptr_t address(const void* p) { return reinterpret_cast<uintptr_t>(p); }
Warp& my_warp() { return warp_of(*grid.current); }

int find_library(dl_phdr_info* info, size_t, void*) {
  uintptr_t low = ~uintptr_t{0}, high = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& part = info->dlpi_phdr[i];
    if (part.p_type != PT_LOAD) continue;
    low = std::min<uintptr_t>(low, info->dlpi_addr + part.p_vaddr);
    high = std::max<uintptr_t>(high, info->dlpi_addr + part.p_vaddr + part.p_memsz);
  }
  if (address(&grid) < low || address(&grid) >= high) return 0;
  library = {low, high - low};
  library_name = info->dlpi_name;
  return 1;
}

// ---- errors ----------------------------------------------------------------------------------------------------------------
std::string place(uint32_t pc) {  // the call, not where it returns to
  char text[32];
  std::snprintf(text, sizeof text, "+0x%x]", pc - 1);
  return "[" + library_name + text;
}
uint32_t offset_of(const void* pc) { return static_cast<uint32_t>(address(pc) - library.begin); }

const char* verb(Access access) { return access == Access::read ? "read" : access == Access::write ? "write" : "atomic"; }

std::string who(const Record& r, uint32_t lanes) {
  std::string text;
  if (r.first < grid.block_start && r.first >= grid.launch_start) {
    size_t i = grid.blocks.size();
    while (i-- > 0 && grid.blocks[i].first > r.first) {}
    text = "block " + triple(grid.blocks[i].second);
  } else if (r.warp == kSeveral) {
    text = "threads of several warps";
  } else {
    text = name_of(grid.threads[static_cast<size_t>(r.warp * kWarp + __builtin_ctz(lanes))]);
  }
  return text + " " + place(r.pc);
}

std::string where_is(uintptr_t at) {
  if (address(grid.shared) <= at && at < address(grid.shared) + grid.shared_bytes) {
    const size_t offset = at - address(grid.shared);
    if (offset < grid.dynamic_bytes) return "byte " + std::to_string(offset) + " of dynamic shared memory";
    for (const Slot& slot : grid.slots)
      if (offset - slot.offset < slot.bytes)
        return "byte " + std::to_string(offset - slot.offset) + " of a shared array of " + std::to_string(slot.bytes) + " bytes";
  }
  for (size_t i = 0; i < allowed; ++i)
    if (buffers[i].holds(at, 1)) return "byte " + std::to_string(at - buffers[i].begin) + " of " + buffers[i].name;
  return "an unknown place";
}

// "read of byte 4 of 'y' [file+0xoffset]"
std::string describe(Access access, uintptr_t at, const void* pc) {
  return std::string(verb(access)) + " of " + where_is(at) + " " + place(offset_of(pc));
}

[[noreturn]] void fail_order(bool shared, const std::string& access, const char* before, const std::string& by) {
  fail(std::string(shared ? "shared-memory race: " : "global-memory conflict: ") + access + " after " + before + " by " + by +
       ", with no barrier between them");
}

[[noreturn]] void fail_bounds(uintptr_t at, size_t bytes, Access access, const void* pc) {
  std::string where = "; no buffer is allowed";
  size_t nearest = ~size_t{0};
  for (size_t i = 0; i < allowed; ++i) {
    const Buffer& b = buffers[i];
    const bool before = at < b.begin;
    const size_t distance = before ? b.begin - at : at + bytes - b.end;
    if (distance >= nearest) continue;
    nearest = distance;
    where = ", " + std::to_string(distance) + " bytes " + (before ? "before " : "past the end of ") + b.name + " (" +
            std::to_string(b.end - b.begin) + " bytes)";
  }
  fail(std::string("out-of-bounds ") + verb(access) + " of " + std::to_string(bytes) + " bytes " + place(offset_of(pc)) + where);
}

// ---- order -----------------------------------------------------------------------------------------------------------------
// The lanes of `before` that nothing orders before this thread's access; all of them for another block's.
template <bool kShared> uint32_t unordered(const Record& before) {
  if (before.epoch < (kShared ? grid.block_start : grid.launch_start)) return 0;
  if (!kShared && before.first < grid.block_start) return ~0u;
  if (before.epoch < grid.epoch) return 0;
  const Thread& me = *grid.current;
  if (before.warp != me.warp()) return before.lanes;
  uint32_t lanes = before.lanes & ~me.bit();
  const Warp& warp = my_warp();
  if (warp.now != before.stamp)
    for (uint32_t rest = lanes; rest; rest &= rest - 1)
      if (warp.seen[me.lane()][__builtin_ctz(rest)] > before.stamp) lanes &= ~(rest & -rest);
  return lanes;
}

template <bool kShared> void remember(Record& r, bool merge, const void* pc) {
  const Thread& me = *grid.current;
  const uint32_t start = kShared ? grid.block_start : grid.launch_start;
  if (!merge || r.epoch < start) {
    r.first = grid.epoch;
    r.epoch = 0;
  }
  if (r.epoch != grid.epoch) {
    r.lanes = me.bit();
    r.warp = static_cast<int16_t>(me.warp());
  } else if (r.warp != me.warp()) {
    r.warp = kSeveral;
  } else {
    r.lanes = unordered<kShared>(r) | me.bit();  // whatever follows this access follows what was ordered before it
  }
  r.epoch = grid.epoch;
  r.stamp = my_warp().now;
  r.pc = offset_of(pc);
}

template <bool kShared> void check_order(Cell& cell, uintptr_t at, Access access, const void* pc) {
  Record& w = cell.write;
  Record& r = cell.read;
  if (kShared && w.in_flight && w.epoch >= grid.block_start)
    fail_order(kShared, describe(access, at, pc), "a cp.async in flight", who(w, w.lanes));
  if (!(w.atomic && access == Access::atomic))
    if (const uint32_t lanes = unordered<kShared>(w))
      fail_order(kShared, describe(access, at, pc), w.atomic ? "an atomic" : "a write", who(w, lanes));
  if (access == Access::read) {
    remember<kShared>(r, true, pc);
    return;
  }
  if (const uint32_t lanes = unordered<kShared>(r)) fail_order(kShared, describe(access, at, pc), "a read", who(r, lanes));
  const bool atomic = access == Access::atomic;
  remember<kShared>(w, atomic && w.atomic, pc);
  w.atomic = atomic;
  w.in_flight = false;
  r.epoch = 0;  // ordered before this access, and so before all that is ordered after it
}

bool poisoned(uintptr_t at, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i)
    if (reinterpret_cast<const uint8_t*>(at)[i] != 0xff) return false;
  return true;
}

void check_shared(uintptr_t at, size_t bytes, Access access, const void* pc) {
  const size_t offset = at - address(grid.shared);
  bool inside = offset + bytes <= grid.dynamic_bytes;
  for (const Slot& slot : grid.slots) inside |= offset >= slot.offset && offset + bytes <= slot.offset + slot.bytes;
  if (!inside)
    fail(std::string("out-of-bounds shared-memory ") + verb(access) + " of " + std::to_string(bytes) + " bytes " + place(offset_of(pc)) +
         "; there are " + std::to_string(grid.dynamic_bytes) + " bytes of dynamic shared memory and " + std::to_string(grid.slots.size()) +
         " shared arrays");
  if (opt.check_races) shared_shadow.each(at, bytes, [&](Cell& cell) { check_order<true>(cell, at, access, pc); });
}

void check_buffer(Buffer& b, uintptr_t at, size_t bytes, Access access, const void* pc) {
  bool unwritten = false;
  b.shadow.each(at, bytes, [&](Cell& cell) {
    unwritten |= cell.write.epoch < b.since;
    check_order<false>(cell, at, access, pc);
  });
  if (access != Access::write && unwritten && poisoned(at, bytes)) fail(describe(access, at, pc) + ", which nothing has written");
}

void check_global(uintptr_t at, size_t bytes, Access access, const void* pc) {
  const bool writes = access != Access::read;
  for (size_t i = 0, k = last_hit; i < allowed; ++i, k = k + 1 < allowed ? k + 1 : 0) {
    Buffer& b = buffers[k];
    if (!b.holds(at, bytes)) continue;
    if (writes && !b.writable) fail(describe(access, at, pc) + ", which is read-only");
    last_hit = k;
    if (b.writable && opt.check_global) check_buffer(b, at, bytes, access, pc);
    return;
  }
  if (!opt.check_bounds) return;
  if (Range{stack_of(0), kMaxThreads * kStackBytes}.holds(at))
    fail(std::string(verb(access)) + " of another thread's local variable " + place(offset_of(pc)));
  fail_bounds(at, bytes, access, pc);
}

void check(uintptr_t at, size_t bytes, size_t align, Access access, const void* pc) {
  if (at & (align - 1))
    fail(std::string("misaligned ") + verb(access) + " of " + std::to_string(bytes) + " bytes at an address that is a multiple of " +
         std::to_string(at & -at) + " " + place(offset_of(pc)));
  if (at - address(grid.shared) < grid.shared_bytes) check_shared(at, bytes, access, pc);
  else check_global(at, bytes, access, pc);
}

// Memory that needs no check: the thread's own, and what no kernel writes.
bool unshared(uintptr_t at) { return own_stack.holds(at) || library.holds(at) || parameters.holds(at); }
}  // namespace

// ---- shared memory -----------------------------------------------------------------------------------------------------------
// Dynamic memory, a gap, and the FISNET_SHARED arrays in the order in which the kernel meets them, each with a gap behind it.
constexpr size_t kGap = 128;

void start_shared(size_t dynamic_bytes) {
  const size_t most = opt.max_shared + 2 * kStaticShared + 4 * kGap;
  if (shared_capacity < most) {
    shared_storage.reset(new char[most + kGap]);
    shared_capacity = most;
    grid.shared = reinterpret_cast<char*>((address(shared_storage.get()) + kGap - 1) & ~(kGap - 1));
  }
  grid.dynamic_bytes = dynamic_bytes;
  grid.static_start = ((dynamic_bytes + kGap - 1) & ~(kGap - 1)) + kGap;
  grid.shared_bytes = grid.static_start;
  grid.slots.clear();
  ++grid.launch_no;
  shared_shadow.cover(grid.shared, grid.shared_bytes);
}

void* dynamic_shared() { return grid.shared; }

void* static_shared(SharedArray& array) {
  if (array.launch_no != grid.launch_no) {
    Inside inside;
    size_t used = array.bytes;
    for (const Slot& slot : grid.slots) used += slot.bytes;
    if (used > kStaticShared) fail("the shared arrays of this kernel have more than 48 KB");
    if (used + grid.dynamic_bytes > opt.max_shared)
      fail("this block has " + std::to_string(used + grid.dynamic_bytes) + " bytes of shared memory, and may have " +
           std::to_string(opt.max_shared));
    const size_t offset = (grid.shared_bytes + array.align - 1) / array.align * array.align;
    array.launch_no = grid.launch_no;
    array.offset = offset;
    grid.slots.push_back({offset, array.bytes});
    grid.shared_bytes = offset + array.bytes + 16;
    std::memset(grid.shared + offset, opt.poison, array.bytes);
    shared_shadow.grow(grid.shared_bytes);
  }
  return grid.shared + array.offset;
}

bool in_shared(const void* p, size_t bytes) {
  return address(p) >= address(grid.shared) && address(p) + bytes <= address(grid.shared) + grid.shared_bytes;
}
void check_space(const void* p, bool shared) {
  Inside inside;
  if (in_shared(p, 1) != shared) fail(shared ? "store to shared memory at an address elsewhere" : "store to global memory at an address in shared memory");
}

void mark_in_flight(const void* p, size_t bytes) {
  if (opt.check_races) shared_shadow.each(address(p), bytes, [](Cell& cell) { cell.write.in_flight = true; });
}
void mark_landed(const void* p, size_t bytes) {  // as if the thread had just written it
  if (!opt.check_races) return;
  shared_shadow.each(address(p), bytes, [](Cell& cell) {
    cell.write.in_flight = false;
    cell.write.epoch = grid.epoch;
    cell.write.stamp = my_warp().now;
  });
}

// ---- what may be touched -------------------------------------------------------------------------------------------------------
void allow(const void* p, size_t bytes, bool writable, const char* name) {
  if (allowed == buffers.size()) buffers.emplace_back();
  Buffer& b = buffers[allowed++];
  b.begin = address(p);
  b.end = b.begin + bytes;
  b.writable = writable;
  b.since = grid.epoch + 1;
  b.name = *name ? std::string("'") + name + "'" : writable ? "an output" : "an input";
  if (writable) b.shadow.cover(p, bytes);
}
void clear_allowed() { allowed = 0; }

void start_checking(const void* call, size_t call_bytes) {
  if (!library.bytes) dl_iterate_phdr(&find_library, nullptr);
  parameters = {address(call), call_bytes};
  last_hit = 0;
}
void watch_stack(const Thread& t) { own_stack = {stack_of(t.stack), kStackBytes}; }

// ---- every access ----------------------------------------------------------------------------------------------------------------
void touch(const void* p, size_t bytes, Access access, const void* pc) {
  if (!grid.active || unshared(address(p))) return;
  Inside inside;
  check(address(p), bytes, bytes, access, pc);
}

namespace {
// The compiler takes its call-outs for functions that do not throw: the error goes to the scheduler, the thread never goes on.
__attribute__((noinline)) void check_or_abandon(uintptr_t at, size_t bytes, size_t align, Access access, const void* pc) {
  watching = false;
  try {
    check(at, bytes, align, access, pc);
  } catch (...) {
    grid.error = std::current_exception();
  }
  if (grid.error) abandon();
  watching = true;
}
}  // namespace

// Inlined into each call-out, so that what need not be checked costs a few instructions.
static inline __attribute__((always_inline)) void seen(void* p, size_t bytes, size_t align, Access access, const void* pc) {
  if (watching && !unshared(address(p))) check_or_abandon(address(p), bytes, align, access, pc);
}
}  // namespace emu

// ---- the call-outs of gcc's -fsanitize=thread, answered here instead of by libtsan ---------------------------------------------
#define SEEN(access, bytes, align) emu::seen(p, bytes, align, emu::Access::access, __builtin_return_address(0))
// On a GPU an access of n bytes must be aligned to n. Ranges are copies of structs, which a GPU makes member by member.
#define OF_SIZE(n)                                   \
  void __tsan_read##n(void* p) { SEEN(read, n, n); } \
  void __tsan_write##n(void* p) { SEEN(write, n, n); }
extern "C" {
OF_SIZE(1)
OF_SIZE(2)
OF_SIZE(4)
OF_SIZE(8)
OF_SIZE(16)
void __tsan_read_range(void* p, unsigned long n) { SEEN(read, n, 1); }
void __tsan_write_range(void* p, unsigned long n) { SEEN(write, n, 1); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void* fisnet_emu_memcpy(void* to, const void* from, unsigned long n) {
  void* p = const_cast<void*>(from);
  SEEN(read, n, 1);
  p = to;
  SEEN(write, n, 1);
  return std::memcpy(to, from, n);
}
void* fisnet_emu_memset(void* p, int value, unsigned long n) {
  SEEN(write, n, 1);
  return std::memset(p, value, n);
}
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }  // guards of local statics
}
