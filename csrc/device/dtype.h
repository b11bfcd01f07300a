// Element types, as numbers that launchers take. Torch-free, CUDA-free: bindings include it too.
#pragma once

namespace fisnet {
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };
}  // namespace fisnet
