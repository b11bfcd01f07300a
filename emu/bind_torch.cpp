// Settings of the emulator as an operator; the emulated operators themselves are registered by csrc/bind.
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
}  // namespace
}  // namespace fisnet

STABLE_TORCH_LIBRARY(fisnet_emulator, m) { m.def("config(int order, int seed, bool async_random, bool checks, int max_shared=-1) -> ()"); }
STABLE_TORCH_LIBRARY_IMPL(fisnet_emulator, CompositeExplicitAutograd, m) { m.impl("config", TORCH_BOX(&fisnet::emulator_config)); }
