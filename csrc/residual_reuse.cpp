// out = x + sum_k w_k * (gate_k * cache_k) on the CPU, in one pass over memory, equal to the reference bit for bit.
//
// TensorIterator broadcasts the gates, merges dimensions and splits the work over ATen's thread pool.

#include "residual_reuse.h"

#include <ATen/Functions.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include "arguments.h"
#include "gated_residual.h"
#include "residual_sum.h"

namespace harmonica {
namespace {

using Signature = at::Tensor(const at::Tensor&, at::TensorList, const Gates&, const Optional&, at::IntArrayRef);

// The operands of the iterator are out, x, the caches, and the gates that are present.
template <typename T>
void run(at::TensorIterator& iter, const Gates& gates, const Optional& weights, at::IntArrayRef places) {
  const auto factors = weights_at<typename Element<T>::Acc>(weights, places);
  const size_t count = gates.size();
  c10::SmallVector<size_t, 16> gate_operand(count);  // 0: none
  size_t operands = 2 + count;
  for (size_t k = 0; k < count; ++k) gate_operand[k] = gates.get(k).has_value() ? operands++ : 0;

  iter.for_each([&](char** data, const int64_t* strides, int64_t n) {
    const auto operand = [&](size_t i) { return Strided<T>{data[i], strides[i]}; };
    c10::SmallVector<Term<T>, 16> terms(count);
    for (size_t k = 0; k < count; ++k) {
      terms[k].cache = operand(2 + k);
      if (gate_operand[k] != 0) terms[k].gate = operand(gate_operand[k]);
    }
    T* out = reinterpret_cast<T*>(data[0]);
    residual_sum(out, operand(1), terms.data(), factors.empty() ? nullptr : factors.data(), int64_t(count), n);
  });
}

at::Tensor residual_reuse(const at::Tensor& x, at::TensorList caches, const Gates& given_gates,
                          const Optional& weights, at::IntArrayRef places) {
  static const auto reference = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("harmonica::_residual_reuse_reference", "")
                                    .typed<Signature>();
  const Gates gates = in_memory(given_gates);
  if (!is_residual_sum(x, caches, gates) || !are_weights(x, weights, places, caches.size()))
    return reference.call(x, caches, gates, weights, places);
  if (caches.size() == 1 && !weights.has_value())
    return gated_sum(x, caches[0], gates.get(0));  // its loop has no list of terms
  return sum_of_terms(x, caches, gates, weights, places);
}

}  // namespace

at::Tensor sum_of_terms(const at::Tensor& x, at::TensorList caches, const Gates& gates, const Optional& weights,
                        at::IntArrayRef places) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;

  at::TensorIteratorConfig config;
  config.resize_outputs(false).set_check_mem_overlap(false).add_output(out).add_const_input(x);
  for (const at::Tensor& cache : caches) config.add_const_input(cache);
  for (const std::optional<at::Tensor>& gate : gates)
    if (gate.has_value()) config.add_const_input(*gate);
  at::TensorIterator iter = config.build();
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(iter, gates, weights, places); break;
    case at::kDouble: run<double>(iter, gates, weights, places); break;
    case at::kBFloat16: run<BFloat16>(iter, gates, weights, places); break;
    default: run<Float16>(iter, gates, weights, places); break;
  }
  return out;
}

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("residual_reuse", residual_reuse); }

}  // namespace harmonica
