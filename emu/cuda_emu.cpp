// Scheduler, barriers, cp.async model, shared-memory race and bounds checker.  Never instrumented.
#include "cuda_emu.h"
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <sys/mman.h>
#include <algorithm>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {
Options opt;
Stats stats;
namespace {
constexpr size_t kStack = 128 << 10;
struct Copy { char* dst; const char* src; int bytes, src_bytes; bool landed; void* pc; };
struct Fiber {
  void* sp = nullptr;
  uint3 tid{};
  int id = 0;
  bool done = false;
  const char* wait_what = nullptr; const char* wait_file = nullptr; int wait_line = 0;
  std::vector<std::vector<Copy>> groups;  // committed cp.async groups
  std::vector<Copy> open;                 // not yet committed
};
struct Warp { uint32_t mask = 0, arrived = 0; WarpOp op = nullptr; const char* what = nullptr; bool orders = false; void* args[32]; uint32_t epoch = 1; uint32_t exited = 0; uint64_t prio = 0; };
struct Bar { int count = 0; int sum = 0, result = 0; const char* file = nullptr; int line = 0, site = 0; };
struct Cell { uint32_t w_ep = 0, w_wep = 0, r_ep = 0, r_wep = 0; int16_t w_tid = -1, r_tid = -1, r_tid2 = -1, async_tid = -1; void *w_pc = nullptr, *r_pc = nullptr; };

struct State {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready; size_t head = 0;
  Bar bar;
  uint32_t epoch = 1;
  int alive = 0, nthreads = 0;
  Fiber* cur = nullptr;
  void* sched_sp = nullptr;
  char* stacks = nullptr; size_t nstacks = 0;
  std::unique_ptr<char[]> smem_buf; char* smem = nullptr; size_t dyn_bytes = 0, smem_bytes = 0;
  std::vector<std::pair<size_t, size_t>> slots; size_t static_bytes = 0;
  std::vector<Cell> shadow;
  struct GCell { uint32_t block = 0, epoch = 0; int16_t w_tid = -1, r_tid = -1; uint32_t r_block = 0, r_epoch = 0; };   // block 0 = untouched, else index + 1
  struct Buf { const char* p; size_t bytes; bool writable; std::vector<GCell> cells; };
  std::vector<Buf> allowed;
  uint32_t block_no = 0;
  std::vector<std::pair<uintptr_t, uintptr_t>> image;
  const std::function<void()>* body = nullptr;
  std::exception_ptr error;
  std::mt19937_64 rng;
  bool active = false;
  void *sched_stack_bottom = nullptr; size_t sched_stack_size = 0;
} S;

// The linker may give this file the *instrumented* copy of an inline library function (std::string, std::vector<int>),
// so the call-outs are ignored while emulator code runs; every entry point below holds a Busy.
int busy = 1;
struct Busy { Busy() { ++busy; } ~Busy() { --busy; } };

#if defined(__x86_64__)
extern "C" void emu_switch(void** save_sp, void* load_sp);
asm(R"(.text
.globl emu_switch
.hidden emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
#else
#error "add a context switch (ucontext) for this processor"
#endif

size_t static_base() { return ((S.dyn_bytes + 127) & ~size_t(127)) + 128; }   // a red zone lies between
std::string where(void* pc) {
  Dl_info d{};
  char b[256];
  if (pc && dladdr(pc, &d) && d.dli_fname)
    std::snprintf(b, sizeof b, "%s+0x%zx", d.dli_fname, size_t((char*)pc - (char*)d.dli_fbase) - 1);   // addr2line -Cife FILE OFFSET
  else std::snprintf(b, sizeof b, "?");
  return b;
}
std::string tname(int id) { auto& f = S.fibers[id]; return "thread (" + std::to_string(f.tid.x) + "," + std::to_string(f.tid.y) + "," + std::to_string(f.tid.z) + ")"; }

void to_scheduler(bool dying) {
  Fiber* me = S.cur;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(dying ? nullptr : &fake, S.sched_stack_bottom, S.sched_stack_size);
#endif
  (void)dying;
  const int saved = busy;
  emu_switch(&me->sp, S.sched_sp);
  busy = saved;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
void make_ready(int id) { S.ready.push_back(id); }

void draw_priorities() { if (opt.order == Order::random) for (auto& w : S.warps) w.prio = S.rng(); }
void release_barrier() {
  S.bar.result = S.bar.sum; S.bar.count = 0; S.bar.sum = 0; ++S.epoch; ++stats.barriers; draw_priorities();
  for (auto& f : S.fibers) if (f.wait_what && f.wait_file) { f.wait_what = nullptr; f.wait_file = nullptr; if (&f != S.cur || f.done) make_ready(f.id); }
}
bool finish_warp(Warp& w, int base) {   // lanes that have exited are not waited for
  const uint32_t need = w.mask & ~w.exited;
  if (!w.arrived || w.arrived != need) return false;
  w.op(w.args, need);
  if (w.orders) ++w.epoch;
  w.arrived = 0; w.orders = false;
  for (int l = 0; l < 32; ++l) if (need >> l & 1) { Fiber& f = S.fibers[base + l]; f.wait_what = nullptr; if (&f != S.cur) make_ready(f.id); }
  return true;
}
void on_exit_thread() {
  --S.alive;
  auto& w = S.warps[S.cur->id >> 5]; w.exited |= 1u << (S.cur->id & 31);
  try { finish_warp(w, S.cur->id & ~31); } catch (...) { if (!S.error) S.error = std::current_exception(); }
  if (S.alive > 0 && S.bar.count == S.alive) release_barrier();   // exited threads count as arrived (Volta and later)
}
void land(Copy& c) { if (!c.landed) { std::memcpy(c.dst, c.src, c.src_bytes); std::memset(c.dst + c.src_bytes, 0, c.bytes - c.src_bytes); c.landed = true; } }
Cell* cells(const void* p, size_t) { return &S.shadow[size_t((const char*)p - S.smem)]; }
bool in_smem(const void* p) { return (const char*)p >= S.smem && (const char*)p < S.smem + S.smem_bytes; }
bool ordered(int ptid, uint32_t pep, uint32_t pwep) {
  int me = S.cur->id;
  return ptid == me || pep < S.epoch || ((ptid >> 5) == (me >> 5) && pwep < S.warps[me >> 5].epoch);
}
[[noreturn]] void race(const char* kind, size_t off, int other, void* opc, void* pc) {
  fail(std::string("shared-memory race: ") + kind + " at smem+" + std::to_string(off) + " by " + tname(S.cur->id) + " [" + where(pc) + "] against " + tname(other) + " [" + where(opc) + "], no barrier between them");
}
void shadow_access(const void* p, size_t n, bool write, void* pc) {
  const int me = S.cur->id; const uint32_t wep = S.warps[me >> 5].epoch;
  Cell* c = cells(p, n);
  for (size_t i = 0; i < n; ++i, ++c) {
    size_t off = size_t((const char*)p - S.smem) + i;
    if (c->async_tid >= 0) race(write ? "write to the destination of a cp.async in flight" : "read of the destination of a cp.async in flight", off, c->async_tid, c->w_pc, pc);
    if (c->w_tid >= 0 && !ordered(c->w_tid, c->w_ep, c->w_wep)) race(write ? "write after write" : "read after write", off, c->w_tid, c->w_pc, pc);
    if (write) {
      if (c->r_tid >= 0 && !ordered(c->r_tid, c->r_ep, c->r_wep)) race("write after read", off, c->r_tid, c->r_pc, pc);
      if (c->r_tid2 >= 0 && !ordered(c->r_tid2, c->r_ep, c->r_wep)) race("write after read", off, c->r_tid2, c->r_pc, pc);
      c->w_tid = int16_t(me); c->w_ep = S.epoch; c->w_wep = wep; c->w_pc = pc; c->r_tid = c->r_tid2 = -1;
    } else if (c->r_tid < 0 || c->r_ep != S.epoch || (c->r_wep != wep && (c->r_tid >> 5) == (me >> 5) && c->r_tid2 < 0)) {
      c->r_tid = int16_t(me); c->r_tid2 = -1; c->r_ep = S.epoch; c->r_wep = wep; c->r_pc = pc;
    } else if (c->r_tid != me) c->r_tid2 = int16_t(me);
  }
}
void global_access(State::Buf& a, size_t off, size_t n, bool write, void* pc) {
  if (a.cells.empty()) a.cells.resize((a.bytes + 1) / 2);           // 2-byte granularity
  const int me = S.cur->id;
  for (size_t c = off / 2; c < (off + n + 1) / 2; ++c) {
    auto& g = a.cells[c];
    auto clash = [&](uint32_t blk, uint32_t ep, int tid) { return blk && tid != -1 && (blk != S.block_no || (tid != me && ep == S.epoch)); };
    if (clash(g.block, g.epoch, g.w_tid)) fail(std::string("global-memory conflict: ") + (write ? "second write" : "read") + " at offset " + std::to_string(2 * c) + " by " + tname(me) + " [" + where(pc) + "], written by thread #" + std::to_string(g.w_tid) + " of block #" + std::to_string(g.block - 1));
    if (write && clash(g.r_block, g.r_epoch, g.r_tid)) fail("global-memory conflict: write at offset " + std::to_string(2 * c) + " by " + tname(me) + " [" + where(pc) + "], read by thread #" + std::to_string(g.r_tid) + " of block #" + std::to_string(g.r_block - 1));
    if (write) { g.block = S.block_no; g.epoch = S.epoch; g.w_tid = int16_t(me); } else { g.r_block = S.block_no; g.r_epoch = S.epoch; g.r_tid = int16_t(me); }
  }
}
int image_cb(dl_phdr_info* i, size_t, void*) {
  for (int k = 0; k < i->dlpi_phnum; ++k) if (i->dlpi_phdr[k].p_type == PT_LOAD) {
    uintptr_t b = i->dlpi_addr + i->dlpi_phdr[k].p_vaddr; S.image.push_back({b, b + i->dlpi_phdr[k].p_memsz});
  }
  return 0;
}
}  // namespace

void fail(const std::string& m) { throw Error("[cuda_emu] block (" + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," + std::to_string(blockIdx.z) + ") " + m); }

void touch(const void* p, size_t n, bool write, void* pc) {
  Busy b_;
  if (!S.active) return;
  if (in_smem(p)) {
    const size_t off = size_t((const char*)p - S.smem), st = static_base();
    if (off + n > S.dyn_bytes && (off < st || off + n > st + S.static_bytes))
      fail("out-of-bounds shared-memory access at smem+" + std::to_string(off) + " (dynamic size " + std::to_string(S.dyn_bytes) + ") by " + tname(S.cur->id) + " [" + where(pc) + "]");
    if (opt.check_races) shadow_access(p, n, write, pc);
    return;
  }
  if (!opt.check_bounds && !opt.check_global) return;
  const char* q = (const char*)p;
  if (q >= S.stacks && q < S.stacks + S.nstacks * kStack) return;
  for (auto& a : S.allowed) if (q >= a.p && q + n <= a.p + a.bytes) {
    if (write && !a.writable) fail("write to a read-only buffer by " + tname(S.cur->id) + " [" + where(pc) + "]");
    if (opt.check_global && a.writable) global_access(a, size_t(q - a.p), n, write, pc);
    return;
  }
  if (!opt.check_bounds) return;
  for (auto& im : S.image) if ((uintptr_t)q >= im.first && (uintptr_t)q < im.second) return;
  char b[160]; long best = -1;
  for (auto& a : S.allowed) { long d = q < a.p ? a.p - q : q - (a.p + a.bytes); if (best < 0 || d < best) best = d; }
  std::snprintf(b, sizeof b, "out-of-bounds %s of %zu bytes at %p (%ld bytes from the nearest buffer) by ", write ? "write" : "read", n, p, best);
  fail(b + tname(S.cur->id) + " [" + where(pc) + "]");
}
void touch_or_park(const void* p, size_t n, bool write, void* pc) {
  if (!S.active || busy) return;
  try { touch(p, n, write, pc); } catch (...) { S.error = std::current_exception(); }
  if (S.error) to_scheduler(true);   // never resumed
}
void allow(const void* p, size_t bytes, bool writable) { S.allowed.push_back({(const char*)p, bytes, writable, {}}); }
void clear_allowed() { S.allowed.clear(); }
void* dyn_smem() { return S.smem; }
static void poison_slot(int i) {
  char* p = (char*)static_slot(i);
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(p, S.slots[i].second);
#endif
  std::memset(p, opt.poison, S.slots[i].second);
}
int new_static_slot(size_t bytes, size_t align) {
  Busy b_;
  S.static_bytes = (S.static_bytes + align - 1) / align * align;
  S.slots.push_back({S.static_bytes, bytes}); S.static_bytes += bytes;
  if (S.static_bytes > (48 << 10)) fail("static shared memory over 48 KB");
  poison_slot(int(S.slots.size()) - 1);
  return int(S.slots.size()) - 1;
}
void* static_slot(int id) { return S.smem + static_base() + S.slots[id].first; }
unsigned lane_id() { return unsigned(S.cur->id & 31); }

int syncthreads_count(int pred, const char* file, int line, int site) {
  Busy b_;
  Fiber* me = S.cur;
  if (S.bar.count && (S.bar.site != site || S.bar.line != line || std::strcmp(S.bar.file, file)))
    fail("divergent __syncthreads: " + tname(me->id) + " at " + file + ":" + std::to_string(line) + " while others wait at line " + std::to_string(S.bar.line));
  S.bar.file = file; S.bar.line = line; S.bar.site = site; S.bar.sum += pred != 0;
  me->wait_what = "__syncthreads"; me->wait_file = file; me->wait_line = line;
  if (++S.bar.count == S.alive) { release_barrier(); make_ready(me->id); }
  to_scheduler(false);
  return S.bar.result;
}
void syncthreads(const char* file, int line, int site) { syncthreads_count(0, file, line, site); }

void warp_collective(uint32_t mask, WarpOp op, void* arg, const char* what, bool orders) {
  Busy b_;
  Fiber* me = S.cur; Warp& w = S.warps[me->id >> 5]; const int lane = me->id & 31;
  uint32_t exist = S.nthreads - (me->id & ~31) >= 32 ? ~0u : (1u << (S.nthreads - (me->id & ~31))) - 1;
  if (!(mask >> lane & 1)) fail(std::string(what) + ": calling lane is not in its mask");
  mask &= exist;
  if (w.arrived && (w.op != op || w.mask != mask)) fail(std::string("divergent warp collective: ") + what + " against " + w.what + " in warp of " + tname(me->id));
  w.op = op; w.mask = mask; w.what = what; w.orders |= orders; w.args[lane] = arg; w.arrived |= 1u << lane;
  me->wait_what = what;
  if (finish_warp(w, me->id & ~31)) {
    if (opt.order == Order::in_order) return;      // carry on; else go through the queue like everybody
    make_ready(me->id);
  }
  to_scheduler(false);
}

void cp_async(void* dst, const void* src, int bytes, int src_bytes) {
  Busy b_;
  void* pc = __builtin_return_address(0);
  if (!in_smem(dst) || (char*)dst + bytes > S.smem + S.smem_bytes) fail("cp.async destination is not in shared memory");
  if ((uintptr_t)dst % bytes || (src_bytes && (uintptr_t)src % bytes)) fail("cp.async address not aligned to " + std::to_string(bytes));
  if (src_bytes) touch(src, src_bytes, false, pc);
  touch(dst, bytes, true, pc);
  if (opt.check_races) { Cell* c = cells(dst, bytes); for (int i = 0; i < bytes; ++i) c[i].async_tid = int16_t(S.cur->id); }
  Copy c{(char*)dst, (const char*)src, bytes, src_bytes, false, pc};
  if (opt.async_random && (S.rng() & 1)) land(c);
  S.cur->open.push_back(c);
  ++stats.cp_async;
}
void cp_async_commit() { Busy b_; S.cur->groups.push_back(std::move(S.cur->open)); S.cur->open.clear(); }
void cp_async_wait(int n) {
  Busy b_;
  auto& g = S.cur->groups;
  while (int(g.size()) > n) {
    for (auto& c : g.front()) {
      land(c);
      if (opt.check_races) { Cell* s = cells(c.dst, c.bytes); for (int i = 0; i < c.bytes; ++i) { s[i].async_tid = -1; s[i].w_ep = S.epoch; s[i].w_wep = S.warps[S.cur->id >> 5].epoch; } }
    }
    g.erase(g.begin());
  }
}
void count_ldmatrix(void* const* rows, int n) {   // 8 rows of 16 bytes per phase; conflict-free = 1 wavefront each
  ++stats.ldmatrix;
  for (int j = 0; j < n; ++j) {
    int hits[8] = {}; int worst = 0;
    for (int r = 0; r < 8; ++r) { bool dup = false; for (int q = 0; q < r; ++q) dup |= rows[8 * j + q] == rows[8 * j + r]; if (!dup) worst = std::max(worst, ++hits[((char*)rows[8 * j + r] - S.smem) / 16 % 8]); }
    stats.ldmatrix_extra_wavefronts += worst - 1;
  }
}

namespace {
void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, (const void**)&S.sched_stack_bottom, &S.sched_stack_size);
#endif
  try { busy = 0; (*S.body)(); busy = 1; }
  catch (...) { busy = 1; if (!S.error) S.error = std::current_exception(); }
  S.cur->done = true;
  on_exit_thread();
  to_scheduler(true);
}
void switch_to(Fiber& f) {
  S.cur = &f; threadIdx = f.tid; ++stats.switches;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, S.stacks + f.id * kStack, kStack);
#endif
  emu_switch(&S.sched_sp, f.sp);
  busy = 1;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}
void run_block() {
  const int n = S.nthreads;
  std::memset(S.smem, opt.poison, S.dyn_bytes);
  for (size_t i = 0; i < S.slots.size(); ++i) poison_slot(int(i));
  if (opt.check_races) std::fill(S.shadow.begin(), S.shadow.end(), Cell{});
  S.warps.assign((n + 31) / 32, Warp{}); draw_priorities();
  S.bar = Bar{}; S.epoch = 1; S.alive = n; S.ready.clear(); S.head = 0; S.error = nullptr;
  for (int i = 0; i < n; ++i) {
    Fiber& f = S.fibers[i];
    f.id = i; f.done = false; f.wait_what = nullptr; f.wait_file = nullptr; f.groups.clear(); f.open.clear();
    f.tid = make_uint3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    void** sp = (void**)(S.stacks + (i + 1) * kStack - 64);
    *--sp = nullptr; *--sp = (void*)&fiber_main;            // return address of emu_switch; entry is 16n+8
    for (int r = 0; r < 6; ++r) *--sp = nullptr;
    f.sp = sp;
    make_ready(opt.order == Order::reversed ? n - 1 - i : i);
  }
  while (S.head < S.ready.size()) {
    if (opt.order == Order::random) {   // mostly: the warp of highest priority runs on (so that warps drift apart); priorities are redrawn at barriers
      size_t n = S.ready.size() - S.head, k = S.head + S.rng() % n;
      if (S.rng() % 16) for (size_t i = 0; i < n; ++i) { size_t j = S.head + i; if (S.warps[S.ready[j] >> 5].prio > S.warps[S.ready[k] >> 5].prio) k = j; }
      std::swap(S.ready[S.head], S.ready[k]);
    }
    if (opt.order == Order::reversed) std::swap(S.ready[S.head], S.ready.back());
    int id = S.ready[S.head++];
    if (S.head > 4096) { S.ready.erase(S.ready.begin(), S.ready.begin() + S.head); S.head = 0; }
    switch_to(S.fibers[id]);
    if (S.error) std::rethrow_exception(S.error);     // other fibers of the block are abandoned
  }
  if (S.alive) {
    std::string m = "deadlock: " + std::to_string(S.alive) + " threads never got past:"; int shown = 0;
    for (auto& f : S.fibers) if (f.id < n && !f.done && shown++ < 4) m += "\n  " + tname(f.id) + ": " + (f.wait_what ? f.wait_what : "?") + (f.wait_file ? std::string(" at ") + f.wait_file + ":" + std::to_string(f.wait_line) : "");
    fail(m);
  }
}
}  // namespace

void run_grid(dim3 grid, dim3 block, size_t dyn, const std::function<void()>& body) {
  if (S.active) throw Error("nested launch");
  const size_t n = size_t(block.x) * block.y * block.z;
  if (n == 0 || n > 1024 || block.z > 64) throw Error("invalid block size");
  if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw Error("invalid grid size");
  if (dyn > 227 * 1024) throw Error("more than 227 KB of shared memory");
  if (S.nstacks < n) {
    if (S.stacks) munmap(S.stacks, S.nstacks * kStack);
    S.stacks = (char*)mmap(nullptr, n * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    S.nstacks = n;
    S.fibers.resize(n);
  }
  gridDim = grid; blockDim = block; S.nthreads = int(n); S.body = &body; S.dyn_bytes = dyn;
  S.smem_bytes = static_base() + 48 * 1024;   // the tail is for FISNET_SHARED slots, met as the kernel runs
  S.smem_buf.reset(new char[S.smem_bytes + 256]);
  S.smem = (char*)(((uintptr_t)S.smem_buf.get() + 127) & ~uintptr_t(127));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(S.stacks, S.nstacks * kStack);     // fibers abandoned by an error leave their red zones behind
  __asan_poison_memory_region(S.smem + dyn, S.smem_bytes - dyn);
#endif
  if (opt.check_races) S.shadow.assign(S.smem_bytes, Cell{});
  if (opt.check_bounds) {   // code, constants, globals; and the host stack, where launch() keeps the kernel's parameters
    S.image.clear(); dl_iterate_phdr(&image_cb, nullptr);
    pthread_attr_t at; void* base; size_t sz;
    if (!pthread_getattr_np(pthread_self(), &at)) { pthread_attr_getstack(&at, &base, &sz); S.image.push_back({(uintptr_t)base, (uintptr_t)base + sz}); pthread_attr_destroy(&at); }
  }
  for (auto& a : S.allowed) a.cells.clear();
  S.rng.seed(opt.seed); S.active = true; stats.smem_bytes = std::max<uint64_t>(stats.smem_bytes, dyn);
  struct Off { ~Off() { S.active = false; } } off;
  const uint64_t nb = uint64_t(grid.x) * grid.y * grid.z;
  for (uint64_t b = 0; b < nb; ++b) {
    uint64_t k = opt.order == Order::reversed ? nb - 1 - b : b;
    blockIdx = make_uint3(unsigned(k % grid.x), unsigned(k / grid.x % grid.y), unsigned(k / grid.x / grid.y));
    S.block_no = uint32_t(b + 1);
    run_block(); ++stats.blocks; stats.threads += n;
  }
}
}  // namespace emu

// ---- the compiler's -fsanitize=thread call-outs, answered here instead of by libtsan ---------------
extern "C" {
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
// gcc takes these calls for nothrow, so an exception must not leave them: park the fiber, the scheduler rethrows.
static void hook(void* p, size_t n, bool w, void* pc) { emu::touch_or_park(p, n, w, pc); }
#define PC __builtin_return_address(0)
#define H(n) \
  void __tsan_read##n(void* p) { hook(p, n, false, PC); } \
  void __tsan_write##n(void* p) { hook(p, n, true, PC); } \
  void __tsan_unaligned_read##n(void* p) { hook(p, n, false, PC); } \
  void __tsan_unaligned_write##n(void* p) { hook(p, n, true, PC); } \
  void __tsan_volatile_read##n(void* p) { hook(p, n, false, PC); } \
  void __tsan_volatile_write##n(void* p) { hook(p, n, true, PC); }
H(1) H(2) H(4) H(8) H(16)
unsigned char __tsan_atomic8_load(const volatile unsigned char* p, int) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }   // guards of function-local statics
void __tsan_read_range(void* p, unsigned long n) { hook(p, n, false, PC); }
void __tsan_write_range(void* p, unsigned long n) { hook(p, n, true, PC); }
}
