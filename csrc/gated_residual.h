#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace harmonica {

// x + gate * y, or x + y without a gate; arguments that the loops do not take go to the reference.
at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& y, const std::optional<at::Tensor>& gate);

}  // namespace harmonica
