#include "common.h"

#if defined(FISNET_EMU)
#include "../../emu/cuda_emu.h"
#else
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace fisnet {
#if defined(FISNET_EMU)

void* current_stream(int32_t) { return nullptr; }

Launch::Launch(const char* op, const Tensor&) : op_(op) { emu::clear_allowed(); }
const void* Launch::in(const Tensor& t) const {
  int64_t span = t.numel() ? 1 : 0;  // from the first element to the last: a slice of a map has gaps
  for (int64_t d = 0; span && d < t.dim(); ++d) span += (t.size(d) - 1) * t.stride(d);
  emu::allow(t.const_data_ptr(), static_cast<size_t>(span) * t.element_size(), false);
  return t.const_data_ptr();
}
void* Launch::out(Tensor& t) const {
  if (t.numel() == 0) return nullptr;
  std::memset(t.mutable_data_ptr(), 0xff, static_cast<size_t>(t.numel()) * t.element_size());  // NaN: every element must be written
  emu::allow(t.mutable_data_ptr(), static_cast<size_t>(t.numel()) * t.element_size(), true);
  return t.mutable_data_ptr();
}
void* Launch::update(const OptTensor& t) const {
  if (!t.has_value() || t->numel() == 0) return nullptr;
  emu::allow(t->mutable_data_ptr(), static_cast<size_t>(t->numel()) * t->element_size(), true);
  return t->mutable_data_ptr();
}

#else

namespace {
// aoti_torch_get_current_cuda_stream lives in libtorch_cuda. It is looked up instead of being linked, so that one library,
// built beside a CPU-only torch, loads everywhere.
using GetStream = AOTITorchError (*)(int32_t, void**);
GetStream find_get_stream() {
  static constexpr const char* kName = "aoti_torch_get_current_cuda_stream";
  if (void* f = dlsym(RTLD_DEFAULT, kName)) return reinterpret_cast<GetStream>(f);
  // torch loads its libraries with RTLD_LOCAL: ask for the one that is loaded already (this never loads it anew)
  if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) {
    void* f = dlsym(library, kName);
    dlclose(library);
    return reinterpret_cast<GetStream>(f);
  }
  return nullptr;
}
}  // namespace

void* current_stream(int32_t device) {
  static const GetStream get = find_get_stream();
  STD_TORCH_CHECK(get != nullptr, "this build of torch has no CUDA (libtorch_cuda.so is not loaded)");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

Launch::Launch(const char* op, const Tensor& on) : op_(op), stream_(nullptr), guard_(on.get_device_index()) {
  stream_ = current_stream(on.get_device_index());
}
const void* Launch::in(const Tensor& t) const { return t.const_data_ptr(); }
void* Launch::out(Tensor& t) const { return t.numel() ? t.mutable_data_ptr() : nullptr; }
void* Launch::update(const OptTensor& t) const { return t.has_value() && t->numel() ? t->mutable_data_ptr() : nullptr; }

#endif

void Launch::done(int error) const { STD_TORCH_CHECK(error == 0, op_, ": the kernel did not launch, CUDA error ", error); }
}  // namespace fisnet
