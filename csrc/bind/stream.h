// The current CUDA stream, found at run time. Torch-free, CUDA-free.
#pragma once
#include <cstdint>

namespace fisnet {
// The current stream of `device` as a cudaStream_t; raises when this torch has no CUDA.
void* current_stream(int32_t device);
}  // namespace fisnet
