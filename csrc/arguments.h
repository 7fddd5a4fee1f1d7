// Decides which tensors the loops of this folder take. All others go to an op's reference, which computes them or says
// what is wrong with them.
#pragma once

#include <ATen/Functions.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <c10/util/ArrayRef.h>
#include <c10/util/SmallVector.h>

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

using Optional = std::optional<at::Tensor>;
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

// Whether there is a weight, or a place of -1, for each of `count` caches; without weights there are no places.
inline bool are_weights(const at::Tensor& x, const Optional& weights, at::IntArrayRef places, size_t count) {
  if (!weights.has_value()) return places.empty();
  if (weights->scalar_type() != at::kFloat || weights->device() != x.device() || weights->layout() != at::kStrided)
    return false;
  for (const int64_t place : places)
    if (place < -1 || place >= weights->numel()) return false;
  return places.size() == count;
}

// The weight of each cache, 1 where its place is -1; all 1 without weights.
template <typename Acc>
c10::SmallVector<Acc, 16> weights_at(const Optional& weights, at::IntArrayRef places, size_t count) {
  c10::SmallVector<Acc, 16> found(count, Acc(1));
  if (!weights.has_value()) return found;
  const at::Tensor dense = weights->contiguous();
  const float* const numbers = static_cast<const float*>(dense.const_data_ptr());
  for (size_t k = 0; k < count; ++k)
    if (places[k] >= 0) found[k] = Acc(numbers[places[k]]);
  return found;
}

// The caches, gates and weights of a residual sum. Gate k multiplies a weighted sum of the next counts[k] caches, or,
// where `counts` is empty, one.
struct Summands {
  at::TensorList caches;
  Gates gates;
  const Optional& weights;
  at::IntArrayRef places, counts;

  bool is_plain() const { return !weights.has_value() && counts.empty(); }
};

constexpr int64_t most_per_gate = 4;  // caches that the loops add up before they multiply by the gate

inline bool is_residual_sum(const at::Tensor& x, const Summands& terms) {
  const auto& [caches, gates, weights, places, counts] = terms;
  if (!is_known(x) || caches.empty() || !are_weights(x, weights, places, caches.size())) return false;
  if (gates.size() != (counts.empty() ? caches.size() : counts.size())) return false;
  int64_t taken = counts.empty() ? int64_t(caches.size()) : 0;
  for (const int64_t count : counts) {
    if (count < 1 || count > most_per_gate) return false;
    taken += count;
  }
  if (taken != int64_t(caches.size())) return false;
  for (const at::Tensor& cache : caches)
    if (!has_shape_of(x, cache)) return false;
  for (const Optional& gate : gates)
    if (!broadcasts_to(x, gate)) return false;
  return true;
}

}  // namespace harmonica
