// W bytes beside W elements: winners, masks.
#pragma once
#include <type_traits>

#include "portable.cuh"

namespace fisnet {
// Moved by one access of W bytes (1, 2, 4 or 8); `fetch` and `put` need memory that starts on a multiple of W. As Raw (maps.cuh)
// they stay in whole words until they are asked for, so that nothing waits for them before.
template <int W> class RawBytes {
 public:
  __device__ __forceinline__ unsigned operator[](int i) const { return word_[i / 4] >> (i % 4 * 8) & 0xffu; }
  // In the order of i.
  __device__ __forceinline__ void set(int i, unsigned byte) { word_[i / 4] = (i % 4 ? word_[i / 4] : 0u) | byte << (i % 4 * 8); }
  __device__ __forceinline__ void fetch(const uint8_t* from) {
    if constexpr (W == 8) {
      const uint2 q = *reinterpret_cast<const uint2*>(from);
      word_[0] = q.x; word_[1] = q.y;
    } else {
      word_[0] = *reinterpret_cast<const Word*>(from);
    }
  }
  __device__ __forceinline__ void put(uint8_t* to) const {
    if constexpr (W == 8) {
      *reinterpret_cast<uint2*>(to) = uint2{word_[0], word_[1]};
    } else {
      *reinterpret_cast<Word*>(to) = static_cast<Word>(word_[0]);
    }
  }

 private:
  static_assert(W == 1 || W == 2 || W == 4 || W == 8, "one access");
  using Word = std::conditional_t<W == 1, uint8_t, std::conditional_t<W == 2, uint16_t, uint32_t>>;
  uint32_t word_[W == 8 ? 2 : 1] = {};
};
}  // namespace fisnet
