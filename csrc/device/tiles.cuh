// The compiled set of tile shapes, and the choice among them at launch.
#pragma once
#include "product.cuh"

namespace fisnet {
// One product: 64 (or 32) accumulators a thread.
using Tile128x128 = Tile<128, 128, 8, 4>;
using Tile128x64 = Tile<128, 64, 4, 4>;
using Tile64x64 = Tile<64, 64, 4, 4>;
// Two products, or two operands: as many accumulators in smaller parts of the tile. Half as many without 16-byte access, whose
// addresses take registers, and for double, whose accumulators take two each.
using PairTile128x64 = Tile<128, 64, 8, 3>;
using PairTile64x64 = Tile<64, 64, 4, 3>;
using NarrowPairTile64x64 = Tile<64, 64, 8, 3>;

// What runs for a shape that was asked for: 16-byte access where channels and pointers allow it; for others, and for double, the
// smallest shape alone is compiled.
template <typename T> constexpr TileShape effective_shape(TileShape asked, bool is_wide) {
  return is_wide && !std::is_same_v<T, double> ? asked : TileShape::t64x64;
}

// The largest shape needs all registers for accumulators: two products, and rows that wait in registers, do without it.
template <typename Product> constexpr bool kHasLargest = Product::kProducts == 1 && !Product::kPrologue;

template <typename T, typename Product, typename Epilogue>
int launch_tile(TileShape asked, bool is_wide, const ProductOperands& p, const Epilogue& epilogue, void* partial, cudaStream_t stream) {
  constexpr bool kPair = Product::kProducts == 2;
  using Small = std::conditional_t<kPair, PairTile64x64, Tile64x64>;
  if constexpr (!std::is_same_v<T, double>) {
    if (is_wide) {
      switch (asked) {
        case TileShape::t128x128:
          if constexpr (kHasLargest<Product>) return launch_linear<T, Tile128x128, 1, Product>(p, epilogue, partial, stream);
          else return static_cast<int>(cudaErrorInvalidValue);
        case TileShape::t128x64:
          return launch_linear<T, std::conditional_t<kPair, PairTile128x64, Tile128x64>, 1, Product>(p, epilogue, partial, stream);
        case TileShape::t64x64: return launch_linear<T, Small, 1, Product>(p, epilogue, partial, stream);
      }
    }
  }
  return launch_linear<T, std::conditional_t<kPair, NarrowPairTile64x64, Tile64x64>, 0, Product>(p, epilogue, partial, stream);
}
}  // namespace fisnet
