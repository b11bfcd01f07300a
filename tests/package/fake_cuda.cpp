// A CUDA device that computes nothing, for a CPU build of torch: enough for autograd to run backward passes over fake tensors
// that say they are on one. Loaded before torch (which asks for the hooks once, when it is imported), in a process of its own.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace at {
// What the autograd engine asks: is there an accelerator, and how many of them.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex exchangeDevice(DeviceIndex) const override { return 0; }
  DeviceIndex maybeExchangeDevice(DeviceIndex) const override { return 0; }
  void setCurrentDevice(DeviceIndex) const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}  // namespace at

namespace {
using namespace c10;

// Its only stream is the default one of device 0, where every node of a graph runs.
struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  static Device here() { return Device(DeviceType::CUDA, 0); }
  Device exchangeDevice(Device) const override { return here(); }
  Device getDevice() const override { return here(); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, here()); }
  Stream getNewStream(Device, int) const override { return getStream(here()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(here()); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}  // namespace
