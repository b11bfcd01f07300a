// What the library holds, filled by the kernel files themselves when it is loaded (so there is no central list): the
// launchers with the fields of their parameters (the emulator's tests call them by name), and the kernels (build
// information asks for their registers and shared memory). Torch-free.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "dtype.h"

namespace fisnet {
// One field of a parameter struct, by name: exactly one of the pointers is set.
struct Field {
  const char* name;
  const void** in = nullptr;   // memory that the kernel reads
  void** out = nullptr;        // memory that it writes
  int64_t* i64 = nullptr;
  int* i32 = nullptr;
  double* f64 = nullptr;
  bool* flag = nullptr;
  DType* dtype = nullptr;
};
inline Field field(const char* n, const void*& p) { Field f{n}; f.in = &p; return f; }
inline Field field(const char* n, void*& p) { Field f{n}; f.out = &p; return f; }
inline Field field(const char* n, int64_t& v) { Field f{n}; f.i64 = &v; return f; }
inline Field field(const char* n, int& v) { Field f{n}; f.i32 = &v; return f; }
inline Field field(const char* n, double& v) { Field f{n}; f.f64 = &v; return f; }
inline Field field(const char* n, bool& v) { Field f{n}; f.flag = &v; return f; }
inline Field field(const char* n, DType& v) { Field f{n}; f.dtype = &v; return f; }
inline Field field(const char* n, TileShape& v) { Field f{n}; f.i32 = reinterpret_cast<int*>(&v); return f; }

using Visitor = std::function<void(const Field&)>;
struct LauncherEntry {
  std::string name;
  std::function<void(const Visitor&)> describe;  // visits the fields of nobody's parameters: their names and kinds
  std::function<int(const Visitor&)> run;        // fill every field, then launch on the default stream
};
struct KernelEntry {
  std::string name;
  const void* function;
};
inline std::vector<LauncherEntry>& launchers() {
  static std::vector<LauncherEntry> all;
  return all;
}
inline std::vector<KernelEntry>& kernels() {
  static std::vector<KernelEntry> all;
  return all;
}

// A launcher `int launch_x(const XParams&, void* stream)` whose struct has `template <class F> void each(F&& f)`, which
// calls f(field("name", member)) for every member.
template <typename Params> bool add_launcher(const char* name, int (*launch)(const Params&, void*)) {
  const auto describe = [](const Visitor& visit) {
    Params p{};
    p.each(visit);
  };
  const auto run = [launch](const Visitor& fill) {
    Params p{};
    p.each(fill);
    return launch(p, nullptr);
  };
  launchers().push_back({name, describe, run});
  return true;
}
inline bool add_kernel(const char* name, const void* function) {
  kernels().push_back({name, function});
  return true;
}
}  // namespace fisnet

#define FISNET_JOIN_(a, b) a##b
#define FISNET_JOIN(a, b) FISNET_JOIN_(a, b)
// At the end of a kernel file: FISNET_LAUNCHER(phi_scale, launch_phi_scale); FISNET_KERNEL(phi_scale_kernel<float, 4>);
#define FISNET_LAUNCHER(name, launch) \
  [[maybe_unused]] static const bool FISNET_JOIN(launcher_registered_, __LINE__) = ::fisnet::add_launcher(#name, launch)
#define FISNET_KERNEL(...)                                              \
  [[maybe_unused]] static const bool FISNET_JOIN(kernel_registered_, __LINE__) = \
      ::fisnet::add_kernel(#__VA_ARGS__, reinterpret_cast<const void*>(&__VA_ARGS__))
