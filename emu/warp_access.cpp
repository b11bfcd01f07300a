// A warp's accesses to shared memory, and bank conflicts. Shared memory serves 128 bytes at once, 32 banks of 4 bytes: words of
// 4 bytes for all lanes, 16 bytes for 8 lanes or rows at a time. Lanes that name the same word are served together.
#include <algorithm>
#include <cstring>

#include "internal.h"

namespace emu {
namespace {
// How often the `lanes` words at `at` must wait.
template <unsigned kWidth> uint64_t conflicts(const uintptr_t* at, int lanes) {
  constexpr unsigned kBanks = 128 / kWidth;
  uintptr_t first[32];
  uint32_t taken = 0;
  bool clash = false;
  for (int i = 0; i < lanes; ++i) {
    const unsigned bank = at[i] / kWidth % kBanks;
    if (taken >> bank & 1) clash |= first[bank] != at[i];
    else first[bank] = at[i];
    taken |= 1u << bank;
  }
  if (!clash) return 0;
  uint64_t words[32] = {}, most = 0;
  for (int i = 0; i < lanes; ++i)
    if (std::find(at, at + i, at[i]) == at + i) most = std::max(most, ++words[at[i] / kWidth % kBanks]);
  return most - 1;
}

template <unsigned kWidth> uint64_t conflicts(const uintptr_t (&at)[32]) {
  constexpr int kTogether = 128 / kWidth;
  uint64_t sum = 0;
  for (int i = 0; i < 32; i += kTogether) sum += conflicts<kWidth>(at + i, kTogether);
  return sum;
}

struct MatrixLoads {
  uint32_t (*out)[4];       // [loads]
  const void* const* rows;  // [loads]
  int loads;
};
template <bool kTransposed> void load_matrices(void* const* args, uint32_t mask) {
  if (mask != ~0u) fail("ldmatrix needs all 32 lanes");
  const int loads = static_cast<const MatrixLoads*>(args[0])->loads;
  for (int i = 0; i < loads; ++i) {
    uintptr_t rows[32];
    for (int lane = 0; lane < 32; ++lane) rows[lane] = reinterpret_cast<uintptr_t>(static_cast<const MatrixLoads*>(args[lane])->rows[i]);
    ++stats.ldmatrix;
    stats.ldmatrix_conflicts += conflicts<16>(rows);
    for (int lane = 0; lane < 32; ++lane) {
      const int pair = 2 * (lane & 3), single = lane >> 2;
      for (int j = 0; j < 4; ++j) {
        char* const to = reinterpret_cast<char*>(&static_cast<const MatrixLoads*>(args[lane])->out[i][j]);
        const auto row = [&](int r) { return reinterpret_cast<const char*>(rows[8 * j + r]); };
        if (kTransposed) {
          std::memcpy(to, row(pair) + 2 * single, 2);
          std::memcpy(to + 2, row(pair + 1) + 2 * single, 2);
        } else {
          std::memcpy(to, row(single) + 2 * pair, 4);
        }
      }
    }
  }
}

void touch_shared(const void* p, size_t bytes, Access access, const char* what, const void* pc) {
  if (!in_shared(p, bytes)) fail(std::string(what) + " at an address that is not in shared memory");
  touch(p, bytes, access, pc);
}

// A lane need not wait for the others here: it has what it loaded. The warp's n-th accesses of this kind are one.
template <unsigned kWidth, bool kStore> void arrive(const char* what, const void* p) {
  Warp& w = warp_of(*grid.current);
  const int lane = grid.current->lane();
  const size_t n = w.next_access[lane]++;
  if (n == w.accesses.size()) w.accesses.push_back({what, 0, {}});
  WarpAccess& access = w.accesses[n];
  if (access.what != what)
    fail(std::string("divergent warp: ") + what + " against " + access.what + " of lane " + std::to_string(__builtin_ctz(access.lanes)));
  access.lanes |= grid.current->bit();
  access.at[lane] = reinterpret_cast<uintptr_t>(p);
  if (access.lanes != ~0u) return;
  ++(kStore ? stats.smem_stores : stats.smem_loads);
  (kStore ? stats.smem_store_conflicts : stats.smem_load_conflicts) += conflicts<kWidth>(access.at);
  if (n + 1 == w.accesses.size()) {  // those before are complete too
    w.accesses.clear();
    std::fill_n(w.next_access, kWarp, 0);
  }
}
constexpr char kLds32[] = "lds32", kLds128[] = "lds128", kSts128[] = "sts128";
}  // namespace

void finish_accesses(const Warp& w) {
  for (const WarpAccess& access : w.accesses)
    if (access.lanes != ~0u)
      fail(std::string(access.what) + " needs all 32 lanes: lane " + std::to_string(__builtin_ctz(~access.lanes)) + " of warp " + std::to_string(w.id) + " was not there");
}

void ldmatrix(uint32_t (*out)[4], const void* const* rows, int loads, bool transposed) {
  Inside inside;
  for (int i = 0; i < loads; ++i) touch_shared(rows[i], 16, Access::read, "ldmatrix", __builtin_return_address(0));
  MatrixLoads mine{out, rows, loads};
  collective(~0u, transposed ? &load_matrices<true> : &load_matrices<false>, &mine, "ldmatrix", false);
}

uint32_t lds32(const void* at) {
  Inside inside;
  touch_shared(at, 4, Access::read, kLds32, __builtin_return_address(0));
  arrive<4, false>(kLds32, at);
  uint32_t word;
  std::memcpy(&word, at, 4);
  return word;
}

void lds128(uint32_t* out, const void* at) {
  Inside inside;
  touch_shared(at, 16, Access::read, kLds128, __builtin_return_address(0));
  arrive<16, false>(kLds128, at);
  std::memcpy(out, at, 16);
}

void sts128(void* at, const uint32_t* from) {
  Inside inside;
  touch_shared(at, 16, Access::write, kSts128, __builtin_return_address(0));
  arrive<16, true>(kSts128, at);
  std::memcpy(at, from, 16);
}

// cp.async is no collective, so lanes are brought together afterwards: the n-th copies of 8 lanes since the last barrier or
// commit are one access. Lanes that copied nothing in that time took no part; where the others differ in number, none is counted.
void count_copies(Warp& w) {
  size_t from[kWarp] = {};  // where the lane's copies start that are not counted yet
  for (bool more = true; more;) {
    more = false;
    for (int quarter = 0; quarter < kWarp; quarter += 8) {
      size_t copies[8], most = 0, sum = 0;
      bool agree = true;
      for (int i = 0; i < 8; ++i) {
        const auto& all = w.copies[quarter + i];
        const size_t start = from[quarter + i];
        copies[i] = static_cast<size_t>(std::find(all.begin() + static_cast<ptrdiff_t>(start), all.end(), kCommit) - all.begin()) - start;
        agree &= !copies[i] || !most || copies[i] == most;
        most = std::max(most, copies[i]);
        sum += copies[i];
      }
      for (size_t n = 0; agree && n < most; ++n) {
        uintptr_t at[8];
        int lanes = 0;
        for (int i = 0; i < 8; ++i)
          if (copies[i]) at[lanes++] = w.copies[quarter + i][from[quarter + i] + n];
        stats.cp_async_conflicts += conflicts<16>(at, lanes);
      }
      if (!agree) stats.cp_async_uncounted += sum;
      for (int i = 0; i < 8; ++i) {
        size_t& start = from[quarter + i];
        start = std::min(start + copies[i] + 1, w.copies[quarter + i].size());
        more |= start < w.copies[quarter + i].size();
      }
    }
  }
  for (auto& all : w.copies) all.clear();
}
}  // namespace emu
