#pragma once

#include <ATen/core/Tensor.h>

#include "arguments.h"

namespace harmonica {

// x + sum_k w_k * (gate_k * cache_k), for arguments that `is_residual_sum` and `are_weights` of arguments.h allow.
at::Tensor sum_of_terms(const at::Tensor& x, at::TensorList caches, const Gates& gates, const Optional& weights,
                        at::IntArrayRef places);

}  // namespace harmonica
