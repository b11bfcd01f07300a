#include "build_info.h"

#include "../device/portable.cuh"
#include "../device/registry.h"

#define FISNET_TEXT_(...) #__VA_ARGS__
#define FISNET_TEXT(...) FISNET_TEXT_(__VA_ARGS__)
#ifndef FISNET_ARCHS  // a list with commas, unquoted: nothing between setup.py and the compiler can spoil it
#define FISNET_ARCHS unknown
#endif

namespace fisnet {
std::string build_info() {
  std::string json = "{";
#if defined(FISNET_EMU)
  json += "\"cuda\": \"emulated\", \"archs\": \"none\", \"compiler\": \"g++ " __VERSION__ "\"";
#else
  json += "\"cuda\": \"" FISNET_TEXT(__CUDACC_VER_MAJOR__) "." FISNET_TEXT(__CUDACC_VER_MINOR__) "." FISNET_TEXT(__CUDACC_VER_BUILD__) "\"";
  json += ", \"cudart\": " + std::to_string(CUDART_VERSION) + ", \"archs\": \"" FISNET_TEXT(FISNET_ARCHS) "\", \"compiler\": \"g++ " __VERSION__ "\"";
#endif
  json += ", \"kernels\": {";
  bool first = true;
  for (const KernelEntry& kernel : kernels()) {
    json += (first ? "\"" : ", \"") + kernel.name + "\": {";
    first = false;
#if !defined(FISNET_EMU)
    cudaFuncAttributes a{};
    if (cudaFuncGetAttributes(&a, kernel.function) == cudaSuccess)
      json += "\"registers\": " + std::to_string(a.numRegs) + ", \"shared\": " + std::to_string(a.sharedSizeBytes) + ", \"local\": " +
              std::to_string(a.localSizeBytes) + ", \"threads\": " + std::to_string(a.maxThreadsPerBlock);
    else
      (void)cudaGetLastError();  // no device here: leave no error behind
#endif
    json += "}";
  }
  return json + "}}";
}
}  // namespace fisnet
