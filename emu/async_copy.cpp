// cp.async: copies land when their thread waits for them, or some of them at once (Options::async_random). The source is read
// when the copy lands, which is the last moment at which a GPU may read it.
#include <cstring>

#include "internal.h"

namespace emu {
namespace {
void land(Copy& copy) {
  if (std::exchange(copy.landed, true)) return;
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.from_bytes));
  std::memset(copy.to + copy.from_bytes, 0, static_cast<size_t>(copy.bytes - copy.from_bytes));
}
}  // namespace

void cp_async(void* to, const void* from, int bytes, int from_bytes) {
  const void* pc = __builtin_return_address(0);
  Inside inside;
  const auto misaligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) != 0; };
  if (misaligned(to) || (from_bytes && misaligned(from)))
    fail("cp.async of " + std::to_string(bytes) + " bytes at an address that is not a multiple of it");
  if (!in_shared(to, static_cast<size_t>(bytes))) fail("cp.async to memory that is not shared");
  if (from_bytes) touch(from, static_cast<size_t>(from_bytes), Access::read, pc);
  touch(to, static_cast<size_t>(bytes), Access::write, pc);
  mark_in_flight(to, static_cast<size_t>(bytes));
  Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, from_bytes, false};
  if (opt.async_random && draw() % 2) land(copy);
  grid.current->open.push_back(copy);
  warp_of(*grid.current).copies[grid.current->lane()].push_back(reinterpret_cast<uintptr_t>(to));
  ++stats.cp_async;
}

void cp_async_commit() {
  Inside inside;
  grid.current->groups.push_back(std::exchange(grid.current->open, {}));
  warp_of(*grid.current).copies[grid.current->lane()].push_back(kCommit);
}

void cp_async_wait(int groups_left) {
  Inside inside;
  auto& groups = grid.current->groups;
  while (static_cast<int>(groups.size()) > groups_left) {
    for (Copy& copy : groups.front()) {
      land(copy);
      mark_landed(copy.to, static_cast<size_t>(copy.bytes));
    }
    groups.erase(groups.begin());
  }
}
}  // namespace emu
