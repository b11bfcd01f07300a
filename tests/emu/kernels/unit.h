// Kernels that test the emulator: all take the same parameters and become launchers of the module emulator_units.
#pragma once
#include "numeric.cuh"
#include "registry.h"

namespace fisnet {
struct UnitParams {
  const void* x;                     // what it reads
  void* y;                           // what it writes
  int n;                             // whatever the kernel wants to be told
  int grid_x, grid_y, grid_z;
  int block_x, block_y, block_z;
  int shared;                        // bytes of dynamic shared memory

  template <class F> void each(F&& f) {
    f(field("x", x)); f(field("y", y)); f(field("n", n));
    f(field("grid_x", grid_x)); f(field("grid_y", grid_y)); f(field("grid_z", grid_z));
    f(field("block_x", block_x)); f(field("block_y", block_y)); f(field("block_z", block_z)); f(field("shared", shared));
  }
};
template <typename T> __device__ __forceinline__ const T* from(const UnitParams& p) { return static_cast<const T*>(p.x); }
template <typename T> __device__ __forceinline__ T* to(const UnitParams& p) { return static_cast<T*>(p.y); }

template <void (*kKernel)(UnitParams)> int launch_unit(const UnitParams& p, void* stream) {
  const auto u = [](int v) { return static_cast<unsigned>(v); };
  return static_cast<int>(launch(kKernel, dim3(u(p.grid_x), u(p.grid_y), u(p.grid_z)), dim3(u(p.block_x), u(p.block_y), u(p.block_z)),
                                 static_cast<size_t>(p.shared), static_cast<cudaStream_t>(stream), p));
}
}  // namespace fisnet

#define UNIT(name) FISNET_LAUNCHER(name, launch_unit<name>)
// A template over `bool kBug`: the kernel with the bug, "name/bug", and the one without it, "name/right".
#define PLANTED(name)                                                           \
  [[maybe_unused]] static const bool FISNET_JOIN(planted_, __LINE__) =          \
      add_launcher(#name "/bug", launch_unit<name<true>>) && add_launcher(#name "/right", launch_unit<name<false>>)
