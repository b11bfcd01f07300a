// New tensors whose shape is not that of an operand (for those there is torch::stable::empty_like).
#pragma once
#include <vector>

#include "common.h"

namespace fisnet {
using Ints = std::vector<int64_t>;

// An uninitialised [N, C, ...] on the device of `like`, contiguous or with its channels innermost (4 or 5 axes then).
inline Tensor empty_of(const Tensor& like, const Ints& sizes, ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  const MemoryFormat inside = sizes.size() == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, channels_last ? inside : MemoryFormat::Contiguous);
}
}  // namespace fisnet
