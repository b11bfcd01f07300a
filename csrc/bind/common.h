// What every binding shares. The only torch headers are those of the LibTorch stable ABI, target 2.11, so one library
// serves every later torch. Compiled by g++ alone.
//
// With FISNET_EMU the same bindings run the emulated kernels on CPU tensors, for tests: they then register for the CPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <limits>
#include <optional>

#include "../device/dtype.h"
#include "../device/layout.h"
#include "stream.h"

#if defined(FISNET_EMU)
#define FISNET_KEY CPU
#else
#define FISNET_KEY CUDA
#endif

namespace fisnet {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptTensor = std::optional<Tensor>;

// ---- checks: device, dtype, shape, layout, 32-bit range. Users' mistakes were refused in Python already. --------------
inline DType dtype_of(const Tensor& t, const char* op) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    case ScalarType::Double: return DType::f64;
    default: STD_TORCH_CHECK(false, op, ": dtype must be float32, bfloat16, float16 or float64, got ", torch::headeronly::toString(t.scalar_type()));
  }
}
// The type that per-channel vectors and partial sums have beside elements of `t`.
inline ScalarType acc_type(const Tensor& t) { return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float; }

inline void check_device(const char* op, const char* name, const Tensor& t, const Tensor& like) {
#if defined(FISNET_EMU)
  STD_TORCH_CHECK(!t.is_cuda() && !like.is_cuda(), op, ": the emulator runs CPU tensors, ", name, " is elsewhere");
#else
  STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == like.get_device_index(), op, ": ", name, " must be on the CUDA device of the other operands");
#endif
}
inline bool same_strides(const Tensor& t, const Tensor& like) {
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) > 1 && t.stride(d) != like.stride(d)) return false;
  return true;
}
// `t` is like `like` in device and dtype.
inline void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_device(op, name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), op, ": ", name, " must be ", torch::headeronly::toString(like.scalar_type()), ", got ", torch::headeronly::toString(t.scalar_type()));
}
// `t` is like `like` in device, dtype, shape and memory layout.
inline void check_same(const char* op, const char* name, const Tensor& t, const Tensor& like) {
  check_like(op, name, t, like);
  STD_TORCH_CHECK(t.sizes().equals(like.sizes()), op, ": ", name, " must have the shape of the other operands");
  STD_TORCH_CHECK(same_strides(t, like), op, ": ", name, " must have the memory layout of the other operands");
}
inline void check_same(const char* op, const char* name, const OptTensor& t, const Tensor& like) {
  if (t.has_value()) check_same(op, name, *t, like);
}
// `t` is a dense vector of `count` accumulation values.
inline void check_vector(const char* op, const char* name, const Tensor& t, int64_t count, const Tensor& like) {
  check_device(op, name, t, like);
  STD_TORCH_CHECK(t.scalar_type() == acc_type(like), op, ": ", name, " must be ", torch::headeronly::toString(acc_type(like)), ", got ", torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.numel() == count && t.is_contiguous(), op, ": ", name, " must be a contiguous vector of ", count, " values");
}
inline void check_vector(const char* op, const char* name, const OptTensor& t, int64_t count, const Tensor& like) {
  if (t.has_value()) check_vector(op, name, *t, count, like);
}

// ---- views -----------------------------------------------------------------------------------------------------------
// Whether the axes of [N, C, ...] lie in memory in the order N, ..., C (and densely).
inline bool channels_inside(const Tensor& t) {
  if (t.dim() < 3) return false;
  int64_t expected = 1;
  auto fits = [&](int64_t d) {
    const bool ok = t.size(d) == 1 || t.stride(d) == expected;
    expected *= t.size(d);
    return ok;
  };
  if (!fits(1)) return false;
  for (int64_t d = t.dim() - 1; d >= 2; --d)
    if (!fits(d)) return false;
  return fits(0);
}
// A dense [N, C, ...] by channel; refuses tensors that are neither contiguous nor channels_last.
inline Planes planes_of(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 2, op, ": ", name, " must be [N, C, ...]");
  int64_t inner = 1;
  for (int64_t d = 2; d < t.dim(); ++d) inner *= t.size(d);
  const bool contiguous = t.is_contiguous();
  STD_TORCH_CHECK(contiguous || channels_inside(t), op, ": ", name, " must be dense, contiguous or channels_last");
  STD_TORCH_CHECK(t.size(1) * inner <= std::numeric_limits<int32_t>::max(), op, ": one sample of ", name, " has more than 2^31 - 1 elements");
  STD_TORCH_CHECK(t.size(0) * inner <= std::numeric_limits<int32_t>::max(), op, ": one channel of ", name, " has more than 2^31 - 1 elements");
  const int channels = static_cast<int>(t.size(1));
  if (!contiguous || inner == 1) return {t.size(0) * inner, channels, 1};
  return {t.size(0), channels, inner};
}
// Relevance r [N*K, ...] beside an activation a [N, ...] of the same layout.
inline Maps maps_of(const char* op, const char* name, const Tensor& r, const Tensor& a) {
  check_like(op, name, r, a);
  const int64_t n = a.size(0);
  bool fits = r.dim() == a.dim() && (n ? r.size(0) % n == 0 : r.size(0) == 0);
  for (int64_t d = 1; fits && d < a.dim(); ++d) fits = r.size(d) == a.size(d);
  STD_TORCH_CHECK(fits, op, ": ", name, " must be [N*K, ...] over the activation's [N, ...]");
  int64_t expected_first = 1;
  for (int64_t d = 1; d < a.dim(); ++d) {
    STD_TORCH_CHECK(a.size(d) <= 1 || r.stride(d) == a.stride(d), op, ": ", name, " must have the memory layout of the activation");
    expected_first *= a.size(d);
  }
  STD_TORCH_CHECK(r.size(0) <= 1 || r.numel() == 0 || r.stride(0) == expected_first, op, ": ", name, " must be dense");
  STD_TORCH_CHECK(expected_first <= std::numeric_limits<int32_t>::max(), op, ": one sample has more than 2^31 - 1 elements");
  return {n, n ? static_cast<int>(r.size(0) / n) : 1, expected_first};
}

// ---- memory ------------------------------------------------------------------------------------------------------------
// What an absent result looks like: operators always return tensors.
inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }
inline Tensor acc_vector(const Tensor& like, int64_t count) { return torch::stable::new_empty(like, {count}, acc_type(like)); }

// ---- the launch --------------------------------------------------------------------------------------------------------
// One operator call: makes the tensors' device current, finds its stream, hands out pointers, checks the launch.
// (Under the emulator it also tells the bounds checker which memory may be touched.)
class Launch {
 public:
  Launch(const char* op, const Tensor& on);

  const void* in(const Tensor& t) const;
  const void* in(const OptTensor& t) const { return t.has_value() ? in(*t) : nullptr; }
  void* out(Tensor& t) const;  // null for an absent result (no elements)
  void* update(const OptTensor& t) const;  // an operand that is changed in place; null when absent
  void* stream() const { return stream_; }
  void done(int error) const;

 private:
  const char* op_;
  void* stream_ = nullptr;
#if !defined(FISNET_EMU)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};
}  // namespace fisnet
