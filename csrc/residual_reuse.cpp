// out = x + sum_k gate_k * y_k on the CPU, in one pass over memory, equal to the reference bit for bit; y_k is a cache, or a
// weighted sum of some.
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

using Signature = at::Tensor(const at::Tensor&, at::TensorList, const Gates&, const Optional&, at::IntArrayRef,
                             at::IntArrayRef);

// The operands of the iterator are out, x, the caches, and the gates that are present.
template <typename T>
void run(at::TensorIterator& iter, const Summands& summands) {
  const Weighting<T> weighting(summands);
  const size_t count = summands.caches.size(), gates = summands.gates.size();
  c10::SmallVector<size_t, 16> gate_operand(gates);  // 0: none
  size_t operands = 2 + count;
  for (size_t k = 0; k < gates; ++k) gate_operand[k] = summands.gates.get(k).has_value() ? operands++ : 0;

  iter.for_each([&](char** data, const int64_t* strides, int64_t n) {
    const auto operand = [&](size_t i) { return Strided<T>{data[i], strides[i]}; };
    c10::SmallVector<Strided<T>, 16> caches(count), gate(gates);
    for (size_t k = 0; k < count; ++k) caches[k] = operand(2 + k);
    for (size_t k = 0; k < gates; ++k)
      if (gate_operand[k] != 0) gate[k] = operand(gate_operand[k]);
    T* out = reinterpret_cast<T*>(data[0]);
    residual_sum(out, operand(1), {caches.data(), gate.data(), int64_t(gates), weighting}, n);
  });
}

at::Tensor residual_reuse(const at::Tensor& x, at::TensorList caches, const Gates& gates, const Optional& weights,
                          at::IntArrayRef places, at::IntArrayRef counts) {
  static const auto reference = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("harmonica::_residual_reuse_reference", "")
                                    .typed<Signature>();
  const Summands terms{caches, in_memory(gates), weights, places, counts};
  if (!is_residual_sum(x, terms)) return reference.call(x, caches, terms.gates, weights, places, counts);
  if (caches.size() == 1 && terms.is_plain())
    return gated_sum(x, caches[0], terms.gates.get(0));  // its loop has no list of terms
  return sum_of_terms(x, terms);
}

}  // namespace

at::Tensor sum_of_terms(const at::Tensor& x, const Summands& terms) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;

  at::TensorIteratorConfig config;
  config.resize_outputs(false).set_check_mem_overlap(false).add_output(out).add_const_input(x);
  for (const at::Tensor& cache : terms.caches) config.add_const_input(cache);
  for (const Optional& gate : terms.gates)
    if (gate.has_value()) config.add_const_input(*gate);
  at::TensorIterator iter = config.build();
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(iter, terms); break;
    case at::kDouble: run<double>(iter, terms); break;
    case at::kBFloat16: run<BFloat16>(iter, terms); break;
    default: run<Float16>(iter, terms); break;
  }
  return out;
}

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("residual_reuse", residual_reuse); }

}  // namespace harmonica
