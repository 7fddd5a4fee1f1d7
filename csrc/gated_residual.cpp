// out = x + gate * (w * y) on the CPU, in one pass over memory. The loops here are those without a weight; with one, the
// loops of residual_reuse.cpp run.
//
// Arithmetic is one multiplication and one addition in fp32 (fp64 for fp64), each rounded, then one downcast: the
// same steps in the same order as the reference, and the build turns contraction to fma off. So the result is equal
// to the reference bit for bit, on every instruction set.
//
// TensorIterator broadcasts the gate, merges dimensions and splits the work over ATen's thread pool. The inner
// loops are plain C++ that the compiler vectorises, once per instruction set (fp16: see float16.h).

#include "gated_residual.h"

#include <ATen/Functions.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "arguments.h"
#include "element.h"
#include "float16.h"
#include "multiversion.h"
#include "residual_reuse.h"

namespace harmonica {
namespace {

// The gate of a row is a vector along the row, one number for all of it, or absent.
enum class Gate { vector, scalar, none };

template <typename T, Gate kind>
HARMONICA_ALWAYS_INLINE void row(T* HARMONICA_RESTRICT out, const T* x, const T* y, const T* gate, int64_t n) {
  using Acc = typename Element<T>::Acc;
  const Acc one_gate = kind == Gate::scalar ? Element<T>::load(gate[0]) : Acc(1);
  for (int64_t i = 0; i < n; ++i) {
    const Acc y_i = Element<T>::load(y[i]);
    const Acc gated = kind == Gate::none ? y_i : (kind == Gate::vector ? Element<T>::load(gate[i]) : one_gate) * y_i;
    out[i] = Element<T>::store(Element<T>::load(x[i]) + gated);
  }
}

// A multiversioned function may not be a template, hence one overload per element type.
#define HARMONICA_ROWS(T)                                                                              \
  HARMONICA_MULTIVERSION void vector_gate(T* out, const T* x, const T* y, const T* gate, int64_t n) {  \
    row<T, Gate::vector>(out, x, y, gate, n);                                                          \
  }                                                                                                    \
  HARMONICA_MULTIVERSION void scalar_gate(T* out, const T* x, const T* y, const T* gate, int64_t n) {  \
    row<T, Gate::scalar>(out, x, y, gate, n);                                                          \
  }                                                                                                    \
  HARMONICA_MULTIVERSION void no_gate(T* out, const T* x, const T* y, int64_t n) {                     \
    row<T, Gate::none>(out, x, y, nullptr, n);                                                         \
  }
HARMONICA_ROWS(float)
HARMONICA_ROWS(double)
HARMONICA_ROWS(BFloat16)
#undef HARMONICA_ROWS

// fp16 goes through fp32 buffers that stay in the first-level cache.
template <Gate kind>
void row_by_blocks(Float16* out, const Float16* x, const Float16* y, const Float16* gate, int64_t n) {
  constexpr int64_t block = 512;
  float sum[block], x_wide[block], y_wide[block], gate_wide[block];
  if (kind == Gate::scalar) gate_wide[0] = Element<Float16>::load(gate[0]);
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t length = std::min(block, n - begin);
    widen(x_wide, x + begin, length);
    widen(y_wide, y + begin, length);
    if (kind == Gate::vector) widen(gate_wide, gate + begin, length);
    if (kind == Gate::vector) vector_gate(sum, x_wide, y_wide, gate_wide, length);
    if (kind == Gate::scalar) scalar_gate(sum, x_wide, y_wide, gate_wide, length);
    if (kind == Gate::none) no_gate(sum, x_wide, y_wide, length);
    narrow(out + begin, sum, length);
  }
}
void vector_gate(Float16* out, const Float16* x, const Float16* y, const Float16* gate, int64_t n) {
  row_by_blocks<Gate::vector>(out, x, y, gate, n);
}
void scalar_gate(Float16* out, const Float16* x, const Float16* y, const Float16* gate, int64_t n) {
  row_by_blocks<Gate::scalar>(out, x, y, gate, n);
}
void no_gate(Float16* out, const Float16* x, const Float16* y, int64_t n) {
  row_by_blocks<Gate::none>(out, x, y, nullptr, n);
}

template <typename T>
void run(at::TensorIterator& iter, bool gated) {
  constexpr int64_t unit = sizeof(T);
  iter.for_each([gated](char** data, const int64_t* strides, int64_t n) {
    T* out = reinterpret_cast<T*>(data[0]);
    const T* x = reinterpret_cast<const T*>(data[1]);
    const T* y = reinterpret_cast<const T*>(data[2]);
    const T* gate = gated ? reinterpret_cast<const T*>(data[3]) : nullptr;
    if (strides[0] == unit && strides[1] == unit && strides[2] == unit) {
      if (!gated) return no_gate(out, x, y, n);
      if (strides[3] == unit) return vector_gate(out, x, y, gate, n);
      if (strides[3] == 0) return scalar_gate(out, x, y, gate, n);
    }
    for (int64_t i = 0; i < n; ++i) {  // other strides: correct, but not vectorised
      auto at = [&](int operand) { return data[operand] + i * strides[operand]; };
      auto read = [&](int operand) { return reinterpret_cast<const T*>(at(operand)); };
      row<T, Gate::vector>(reinterpret_cast<T*>(at(0)), read(1), read(2), gated ? read(3) : &Element<T>::one, 1);
    }
  });
}

using Signature = at::Tensor(const at::Tensor&, const at::Tensor&, const Optional&, const Optional&, at::IntArrayRef);

at::Tensor gated_residual(const at::Tensor& x, const at::Tensor& y, const Optional& gate, const Optional& weights,
                          at::IntArrayRef places) {
  static const auto reference = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("harmonica::_gated_residual_reference", "")
                                    .typed<Signature>();
  if (!is_known(x) || !has_shape_of(x, y) || !broadcasts_to(x, gate) || !are_weights(x, weights, places, 1))
    return reference.call(x, y, gate, weights, places);
  return weights.has_value() ? sum_of_terms(x, {y, Gates({gate}), weights, places, {}}) : gated_sum(x, y, gate);
}

}  // namespace

at::Tensor gated_sum(const at::Tensor& x, const at::Tensor& y, const Optional& gate) {
  at::Tensor out = at::empty(x.sizes(), x.options());
  if (out.numel() == 0) return out;

  at::TensorIteratorConfig config;
  config.resize_outputs(false).set_check_mem_overlap(false).add_output(out).add_const_input(x).add_const_input(y);
  if (gate.has_value()) config.add_const_input(*gate);
  at::TensorIterator iter = config.build();
  const bool gated = gate.has_value();
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(iter, gated); break;
    case at::kDouble: run<double>(iter, gated); break;
    case at::kBFloat16: run<BFloat16>(iter, gated); break;
    default: run<Float16>(iter, gated); break;
  }
  return out;
}

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("gated_residual", gated_residual); }

}  // namespace harmonica
