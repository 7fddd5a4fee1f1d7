// For a torch built without CUDA: what it needs to trace operators on fake tensors that lie on cuda:0.
//
// A device guard that does nothing, so that every operator may "set the current device" before it runs. And the choice
// of the attention kernel: without it torch takes the unfused one, whose output lies in memory as [B, H, N, D]; the
// fused ones of a GPU write [B, N, H, D], and the reshape after them copies nothing.
#include <ATen/core/Tensor.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

struct IdleGuard final : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device exchangeDevice(c10::Device) const override {
    return getDevice();
  }
  c10::Device getDevice() const override {
    return {CUDA, 0};
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, IdleGuard)

// Flash attention for half types without a mask, else the memory-efficient kernel; 1 and 2 of sdp::SDPBackend.
int64_t choose_attention(
    const at::Tensor& query,
    const at::Tensor&,
    const at::Tensor&,
    const std::optional<at::Tensor>& mask,
    double,
    bool,
    std::optional<double>,
    bool) {
  const bool half = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  return half && !mask.has_value() && query.sym_size(-1) <= 256 ? 1 : 2;
}

const bool registered = [] {
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);
  return true;
}();

} // namespace
