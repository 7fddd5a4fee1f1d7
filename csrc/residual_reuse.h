#pragma once

#include <ATen/core/Tensor.h>

#include "arguments.h"

namespace harmonica {

// x + sum_k gate_k * y_k, for arguments that `is_residual_sum` of arguments.h allows.
at::Tensor sum_of_terms(const at::Tensor& x, const Summands& terms);

}  // namespace harmonica
