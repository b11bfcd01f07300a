#include "build_info.h"

#include <algorithm>

#include "../device/portable.cuh"
#include "../device/registry.h"

#define FISNET_TEXT_(x) #x
#define FISNET_TEXT(x) FISNET_TEXT_(x)
#ifndef FISNET_ARCHS  // a list with slashes, unquoted: no shell, nor nvcc's own splitting at commas, can spoil it on its way here
#define FISNET_ARCHS unknown
#endif

namespace fisnet {
std::string build_info() {
  [[maybe_unused]] std::string archs = FISNET_TEXT(FISNET_ARCHS);
  std::replace(archs.begin(), archs.end(), '/', ' ');
  std::string json = "{";
#if defined(FISNET_EMU)
  json += "\"cuda\": \"emulated\", \"archs\": \"none\", \"compiler\": \"g++ " __VERSION__ "\"";
#else
  json += "\"cuda\": \"" FISNET_TEXT(__CUDACC_VER_MAJOR__) "." FISNET_TEXT(__CUDACC_VER_MINOR__) "." FISNET_TEXT(__CUDACC_VER_BUILD__) "\"";
  json += ", \"cudart\": " + std::to_string(CUDART_VERSION) + ", \"archs\": \"" + archs + "\", \"compiler\": \"g++ " __VERSION__ "\"";
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
