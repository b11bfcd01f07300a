// Element types and tile shapes, as numbers that launchers take. Torch-free, CUDA-free: bindings include it too.
#pragma once

namespace fisnet {
enum class DType : int { f32 = 0, bf16 = 1, f16 = 2, f64 = 3 };

// Rows x columns of the result that one block of a product makes. Chosen in fisnet_cuda/ops/tiles.py.
enum class TileShape : int { t128x128 = 0, t128x64 = 1, t64x64 = 2 };
constexpr int tile_rows(TileShape tile) { return tile == TileShape::t64x64 ? 64 : 128; }
}  // namespace fisnet
