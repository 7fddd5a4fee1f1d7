// Decides which tensors the loops of this folder take. All others go to an op's reference, which computes them or says
// what is wrong with them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>

namespace harmonica {

inline bool is_known(const at::Tensor& x) {
  const auto dtype = x.scalar_type();
  return x.layout() == at::kStrided &&
         (dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf);
}

inline bool is_like(const at::Tensor& x, const at::Tensor& t) {
  return t.scalar_type() == x.scalar_type() && t.device() == x.device() && t.layout() == at::kStrided;
}

inline bool has_shape_of(const at::Tensor& x, const at::Tensor& t) { return is_like(x, t) && t.sizes() == x.sizes(); }

inline bool broadcasts_to(const at::Tensor& x, const std::optional<at::Tensor>& t) {
  if (!t.has_value()) return true;
  if (!is_like(x, *t) || t->dim() > x.dim()) return false;
  for (int64_t i = 1; i <= t->dim(); ++i)
    if (t->size(-i) != 1 && t->size(-i) != x.size(-i)) return false;
  return true;
}

using Gates = c10::List<std::optional<at::Tensor>>;

// Copies the gates whose values are not those in their memory. The dispatcher turns negated views and zeros without
// memory into ordinary tensors before it calls an op, but not those in a list of optional tensors.
inline Gates in_memory(const Gates& gates) {
  const auto is_lazy = [](const std::optional<at::Tensor>& t) {
    return t.has_value() && (t->is_neg() || t->is_conj() || t->_is_zerotensor());
  };
  bool any = false;
  for (const std::optional<at::Tensor>& gate : gates) any = any || is_lazy(gate);
  if (!any) return gates;
  Gates copies;
  for (const std::optional<at::Tensor>& gate : gates) copies.push_back(is_lazy(gate) ? gate->clone() : gate);
  return copies;
}

inline bool is_residual_sum(const at::Tensor& x, at::TensorList caches, const Gates& gates) {
  if (!is_known(x) || caches.empty() || gates.size() != caches.size()) return false;
  for (size_t k = 0; k < caches.size(); ++k)
    if (!has_shape_of(x, caches[k]) || !broadcasts_to(x, gates.get(k))) return false;
  return true;
}

}  // namespace harmonica
