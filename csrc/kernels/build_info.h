// What the library was built with, as JSON. Torch-free.
#pragma once
#include <string>

namespace fisnet {
// {"cuda", "cudart", "archs", "compiler", "kernels": {name: {"registers", "shared", "local", "threads"}}}; the kernels'
// numbers come from the device's driver and are missing where there is none.
std::string build_info();
}  // namespace fisnet
