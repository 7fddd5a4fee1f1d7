#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace harmonica {

// x + gate * y, or x + y without a gate, for arguments that `is_residual_sum` of arguments.h allows.
at::Tensor gated_sum(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& gate);

}  // namespace harmonica
