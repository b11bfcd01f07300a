// Fibers, schedules, barriers and warp collectives.
//
// A thread that never blocks costs no switch: when it returns, its stack goes straight on to the next thread that has not
// started. A thread that blocks keeps its stack and hands the processor to the next one directly.
#include <sys/mman.h>
#include <unistd.h>
#include <vector_functions.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "internal.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

#if !defined(__x86_64__) || !defined(__linux__)
#error "the emulator switches stacks in x86-64 Linux assembly: write emu_switch and first_frame for this machine"
#endif
// Pushes the registers that a function must preserve, leaves the stack pointer in *save and goes on where `load` left off.
// The floating-point environment is the same for all threads.
extern "C" void emu_switch(void** save, void* load);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch,.-emu_switch
)");

namespace emu {
Options opt;
Stats stats;
Grid grid;
bool watching = false;

namespace {
char* stacks = nullptr;  // kMaxThreads of them; pages come into being when they are touched
std::vector<int> free_stacks;
void* host_sp = nullptr;
void (*run_call)(const void*) = nullptr;
const void* call = nullptr;
bool checks = false;
uint64_t random_state = 0;

struct Barrier {
  int arrived = 0, count = 0, result = 0;
  const char* file = nullptr;
  int line = 0, site = 0;
} at;

// ---- stacks ------------------------------------------------------------------------------------------------------------
void make_stacks() {
  void* p = mmap(nullptr, kMaxThreads * kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) throw Error("no memory for the stacks of emulated threads");
  stacks = static_cast<char*>(p);
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  for (int i = 0; i < kMaxThreads; ++i) mprotect(stacks + i * kStackBytes, page, PROT_NONE);  // an overflow must not go on in the next
}

void* first_frame(int stack, void (*entry)()) {
  const size_t shift = static_cast<size_t>(stack) * 17 * 64 % (64 << 10);  // else all stacks' ends share the same few lines of the caches
  void** sp = reinterpret_cast<void**>(stacks + (stack + 1) * kStackBytes - 64 - shift);
  *--sp = nullptr;  // where entry would return to; it makes the stack pointer 16 n + 8 there, as after a call
  *--sp = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}

// ---- which thread runs next ----------------------------------------------------------------------------------------------
// One of `bits`, by 5 bits of a random number: the next one from there on.
int some_bit(uint32_t bits, uint64_t number) {
  const int from = static_cast<int>(number & 31);
  const uint32_t turned = bits >> from | bits << (-from & 31);
  return (__builtin_ctz(turned) + from) & 31;
}

void draw_priorities() {
  if (opt.order == Order::random)
    for (Warp& w : grid.warps) w.priority = draw();
}

void make_ready(Warp& w, uint32_t lanes) {
  w.ready |= lanes;
  if (lanes) grid.ready |= 1u << w.id;
}

// Takes a thread out of those that can run; null when there is none.
Thread* next_thread() {
  const uint32_t warps = grid.ready;
  if (!warps) return nullptr;
  int warp = 0, lane = 0;
  if (opt.order == Order::random) {  // mostly the warp of highest priority, so that warps drift apart
    const uint64_t number = draw();
    if (number % 16 == 0) {
      warp = some_bit(warps, number >> 4);
    } else {
      warp = __builtin_ctz(warps);
      for (uint32_t rest = warps & (warps - 1); rest; rest &= rest - 1)
        if (const int i = __builtin_ctz(rest); grid.warps[i].priority > grid.warps[warp].priority) warp = i;
    }
    lane = some_bit(grid.warps[warp].ready, number >> 32);
  } else if (opt.order == Order::reversed) {
    warp = 31 - __builtin_clz(warps);
    lane = 31 - __builtin_clz(grid.warps[warp].ready);
  } else {
    warp = __builtin_ctz(warps);
    lane = __builtin_ctz(grid.warps[warp].ready);
  }
  Warp& w = grid.warps[warp];
  w.ready &= ~(1u << lane);
  if (!w.ready) grid.ready &= ~(1u << warp);
  return &grid.threads[warp * kWarp + lane];
}

// ---- switching -----------------------------------------------------------------------------------------------------------
void make_current(Thread& t) {
  grid.current = &t;
  threadIdx = t.index;
  watch_stack(t);
}

void on_return(Thread& t);

// What every stack runs: threads that have not started, one after another, until one that has must go on.
void run_threads() {
  for (;;) {
    Thread& t = *grid.current;
    try {
      watching = checks;
      run_call(call);
      watching = false;
      on_return(t);
    } catch (...) {
      watching = false;
      grid.error = std::current_exception();
    }
    Thread* next = grid.error ? nullptr : next_thread();
    if (!next) abandon();
    const int stack = std::exchange(t.stack, -1);
    if (next->stack < 0) {
      next->stack = stack;
      make_current(*next);
      continue;
    }
    free_stacks.push_back(stack);
    make_current(*next);
    ++stats.switches;
    void* unused;
    emu_switch(&unused, next->sp);
  }
}

void go_to(Thread& next, void** save) {
  if (next.stack < 0) {
    next.stack = free_stacks.back();
    free_stacks.pop_back();
    next.sp = first_frame(next.stack, &run_threads);
  }
  make_current(next);
  ++stats.switches;
  emu_switch(save, next.sp);
}

// The current thread waits, or lets others go first.
void give_way() {
  Thread& me = *grid.current;
  Thread* next = next_thread();
  if (next == &me) return;
  if (!next) abandon();  // a deadlock: everybody waits
  go_to(*next, &me.sp);
}

// ---- barriers and collectives --------------------------------------------------------------------------------------------
void release_barrier() {
  at.result = at.count;
  at.arrived = at.count = 0;
  ++grid.epoch;
  ++stats.barriers;
  draw_priorities();
  for (Warp& w : grid.warps) {
    finish_accesses(w);
    count_copies(w);
    make_ready(w, std::exchange(w.at_barrier, 0));
  }
}

// What a lane of `lanes` did is over for every other one of them, and so is what they knew to be over.
void order_lanes(Warp& w, uint32_t lanes) {
  uint32_t joined[kWarp] = {};
  ++w.now;
  for (int i = 0; i < kWarp; ++i)
    if (has_lane(lanes, i))
      for (int j = 0; j < kWarp; ++j) joined[j] = std::max(joined[j], has_lane(lanes, j) ? w.now : w.seen[i][j]);
  for (int i = 0; i < kWarp; ++i)
    if (has_lane(lanes, i)) std::memcpy(w.seen[i], joined, sizeof joined);
}

// Runs the collective that `lane` waits at if everybody is there. Lanes that have exited are not waited for.
bool finish_collective(Warp& w, int lane) {
  const Arrival& first = w.lane[lane];
  const uint32_t need = first.mask & w.exists & ~w.exited;
  if ((w.arrived & need) != need) return false;
  if (!w.accesses.empty() && need == ~0u) finish_accesses(w);
  void* args[kWarp];
  for (int i = 0; i < kWarp; ++i) args[i] = has_lane(need, i) ? w.lane[i].arg : nullptr;
  first.op(args, need);
  if (first.orders_memory && checks) order_lanes(w, need);
  w.arrived &= ~need;
  make_ready(w, need);
  return true;
}

void on_return(Thread& t) {
  Warp& w = warp_of(t);
  t.done = true;
  w.exited |= t.bit();
  --grid.alive;
  for (int lane = 0; lane < kWarp; ++lane)
    if (has_lane(w.arrived, lane)) finish_collective(w, lane);
  if (grid.alive > 0 && at.arrived == grid.alive) release_barrier();  // since Volta a barrier does not wait for them
}

// ---- blocks --------------------------------------------------------------------------------------------------------------
void start_block() {
  std::memset(grid.shared, opt.poison, grid.dynamic_bytes);
  std::memset(grid.shared + grid.static_start, opt.poison, grid.shared_bytes - grid.static_start);
  grid.block_start = ++grid.epoch;
  grid.blocks.push_back({grid.epoch, blockIdx});
  grid.alive = grid.size;
  grid.ready = 0;
  at = Barrier{};
  for (size_t i = 0; i < grid.warps.size(); ++i) {
    Warp& w = grid.warps[i];
    const int lanes = std::min(kWarp, grid.size - static_cast<int>(i) * kWarp);
    w.id = static_cast<int>(i);
    w.exists = lanes == kWarp ? ~0u : (1u << lanes) - 1;
    w.ready = 0;
    make_ready(w, w.exists);
    w.exited = w.at_barrier = w.arrived = 0;
    if (w.now) std::memset(w.seen, 0, sizeof w.seen);
    w.now = 0;
    w.accesses.clear();
    std::fill_n(w.next_access, kWarp, 0);
    for (auto& lane : w.copies) lane.clear();
  }
  draw_priorities();
  uint3 index{};
  for (int i = 0; i < grid.size; ++i) {
    Thread& t = grid.threads[static_cast<size_t>(i)];
    t.id = i;
    t.index = index;
    t.stack = -1;
    t.done = false;
    t.groups.clear();
    t.open.clear();
    if (++index.x == blockDim.x) {
      index.x = 0;
      if (++index.y == blockDim.y) index.y = 0, ++index.z;
    }
  }
  free_stacks.resize(static_cast<size_t>(grid.size));
  std::iota(free_stacks.rbegin(), free_stacks.rend(), 0);  // the lowest first: the same few stacks, warm in the cache
}

[[noreturn]] void fail_deadlock() {
  grid.current = nullptr;
  std::string m = "deadlock: " + std::to_string(grid.alive) + " threads never got past:";
  std::vector<std::pair<const Thread*, int>> places;  // the first thread at each, how many there are
  for (const Thread& t : grid.threads) {
    if (t.done) continue;
    const auto same = [&](const auto& place) { return place.first->waits_for == t.waits_for && place.first->file == t.file && place.first->line == t.line; };
    const auto found = std::find_if(places.begin(), places.end(), same);
    if (found == places.end()) places.push_back({&t, 1});
    else ++found->second;
  }
  for (const auto& [t, count] : places) {
    m += "\n  " + name_of(*t) + (count > 1 ? " and " + std::to_string(count - 1) + " more" : "") + ": " + t->waits_for;
    if (t->file) m += std::string(" at ") + t->file + ":" + std::to_string(t->line);
  }
  fail(m);
}

void run_block() {
  start_block();
  go_to(*next_thread(), &host_sp);
  watching = false;
  if (grid.error) std::rethrow_exception(std::exchange(grid.error, nullptr));
  if (grid.alive) fail_deadlock();
  for (Warp& w : grid.warps) {
    finish_accesses(w);
    count_copies(w);
  }
  ++stats.blocks;
  stats.threads += static_cast<uint64_t>(grid.size);
}

std::vector<uint64_t> block_order(uint64_t count) {
  std::vector<uint64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (opt.order == Order::reversed) std::reverse(order.begin(), order.end());
  if (opt.order == Order::random)
    for (uint64_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw() % i]);
  return order;
}

bool valid(dim3 g, dim3 b) {
  const uint64_t threads = uint64_t{b.x} * b.y * b.z;
  const bool blocks_fit = g.x && g.y && g.z && g.x <= 0x7fffffffu && g.y <= 65535 && g.z <= 65535;
  return blocks_fit && threads && threads <= kMaxThreads && b.x <= kMaxThreads && b.y <= kMaxThreads && b.z <= 64;
}
}  // namespace

void abandon() {
  void* unused;
  emu_switch(&unused, host_sp);
  __builtin_unreachable();
}

uintptr_t stack_of(int stack) { return reinterpret_cast<uintptr_t>(stacks) + static_cast<size_t>(stack) * kStackBytes; }

uint64_t draw() {  // splitmix64
  uint64_t z = random_state += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::string triple(uint3 i) { return "(" + std::to_string(i.x) + "," + std::to_string(i.y) + "," + std::to_string(i.z) + ")"; }
std::string name_of(const Thread& t) { return "thread " + triple(t.index); }

void fail(const std::string& message) {
  throw Error("[cuda_emu] block " + triple(blockIdx) + (grid.current ? ", " + name_of(*grid.current) : "") + ": " + message);
}

int barrier(bool predicate, const char* file, int line, int site) {
  Inside inside;
  Thread& me = *grid.current;
  if (at.arrived && at.site != site)
    fail(std::string("divergent __syncthreads at ") + file + ":" + std::to_string(line) + ", while others wait at " + at.file + ":" +
         std::to_string(at.line));
  at.file = file;
  at.line = line;
  at.site = site;
  at.count += predicate;
  me.waits_for = "__syncthreads";
  me.file = file;
  me.line = line;
  warp_of(me).at_barrier |= me.bit();
  if (++at.arrived == grid.alive) release_barrier();
  give_way();
  return at.result;
}

unsigned lane_id() { return static_cast<unsigned>(grid.current->lane()); }

void collective(uint32_t mask, WarpOp op, void* arg, const char* what, bool orders_memory) {
  Inside inside;
  Thread& me = *grid.current;
  Warp& w = warp_of(me);
  if (!(mask & me.bit())) fail(std::string(what) + ": the calling lane is not in its mask");
  w.lane[me.lane()] = {mask, op, arg, what, orders_memory};
  // Those whose masks overlap have been found alike when they came. So if one of my mask is here, to be like that one is enough.
  const uint32_t mine = w.arrived & mask;
  for (uint32_t rest = mine ? mine & -mine : w.arrived; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const Arrival& other = w.lane[i];
    if ((other.mask & mask) && (other.mask != mask || other.op != op))
      fail(std::string("divergent warp collective: ") + what + " against " + other.what + " of lane " + std::to_string(i));
  }
  w.arrived |= me.bit();
  me.waits_for = what;
  me.file = nullptr;
  finish_collective(w, me.lane());
  give_way();
}

cudaError_t run_grid(dim3 blocks, dim3 threads, size_t dynamic_bytes, void (*run)(const void*), const void* call_at, size_t call_bytes) {
  if (grid.active) throw Error("[cuda_emu] a launch inside a launch");
  if (!valid(blocks, threads)) return cudaErrorInvalidConfiguration;
  if (dynamic_bytes > opt.max_shared) return cudaErrorInvalidValue;
  if (!stacks) make_stacks();

  gridDim = blocks;
  blockDim = threads;
  run_call = run;
  call = call_at;
  checks = opt.check_races || opt.check_bounds || opt.check_global;
  random_state = opt.seed;
  grid.size = static_cast<int>(threads.x * threads.y * threads.z);
  grid.threads.resize(static_cast<size_t>(grid.size));
  grid.warps.resize(static_cast<size_t>((grid.size + kWarp - 1) / kWarp));
  grid.current = nullptr;
  grid.error = nullptr;
  grid.launch_start = grid.epoch + 1;
  grid.blocks.clear();
  start_shared(dynamic_bytes);
  start_checking(call_at, call_bytes);

  struct Active {
    Active() { grid.active = true; }
    ~Active() { grid.active = false; }
  } active;
  for (uint64_t k : block_order(uint64_t{blocks.x} * blocks.y * blocks.z)) {
    const uint64_t row = k / blocks.x;
    blockIdx = make_uint3(static_cast<unsigned>(k % blocks.x), static_cast<unsigned>(row % blocks.y), static_cast<unsigned>(row / blocks.y));
    run_block();
  }
  return cudaSuccess;
}
}  // namespace emu
