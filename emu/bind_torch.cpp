// Settings and counts of the emulator as operators; the emulated operators themselves are registered by csrc/bind.
#include "../csrc/bind/common.h"
#include "cuda_emu.h"

namespace fisnet {
namespace {
void emulator_config(int64_t order, int64_t seed, bool async_random, bool checks, int64_t max_shared) {
  emu::opt = emu::Options{};
  emu::opt.order = static_cast<emu::Order>(order);
  emu::opt.seed = static_cast<uint64_t>(seed);
  emu::opt.async_random = async_random;
  emu::opt.check_races = emu::opt.check_bounds = emu::opt.check_global = checks;
  if (max_shared >= 0) emu::opt.max_shared = static_cast<size_t>(max_shared);
}

// As JSON: what has been run since the last reset.
std::string emulator_stats() {
  std::string text;
  for (const auto& [name, count] : emu::kStatNames) text += (text.empty() ? "{\"" : ", \"") + std::string(name) + "\": " + std::to_string(emu::stats.*count);
  return text + "}";
}
void emulator_reset_stats() { emu::stats = {}; }
}  // namespace
}  // namespace fisnet

STABLE_TORCH_LIBRARY(fisnet_emulator, m) {
  m.def("config(int order, int seed, bool async_random, bool checks, int max_shared=-1) -> ()");
  m.def("stats() -> str");
  m.def("reset_stats() -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fisnet_emulator, CompositeExplicitAutograd, m) {
  m.impl("config", TORCH_BOX(&fisnet::emulator_config));
  m.impl("stats", TORCH_BOX(&fisnet::emulator_stats));
  m.impl("reset_stats", TORCH_BOX(&fisnet::emulator_reset_stats));
}
