// hidden = x + sum_k gate_k * y_k and out = (norm(hidden) * weight + bias) * (1 + scale) + shift on the CPU, in one
// pass over memory.
//
// A row of hidden stays unrounded in the first-level cache until its statistics are known. Then
// out = normed * factor + offset, with factor = weight * (1 + scale) and offset = bias * (1 + scale) + shift. These two
// are computed once where scale and shift are the same for many rows, as they are in a DiT.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/util/SmallVector.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "float16.h"
#include "moments.h"
#include "multiversion.h"
#include "residual_sum.h"

namespace harmonica {
namespace {

using Results = std::tuple<at::Tensor, at::Tensor>;
using Signature = Results(const at::Tensor&, at::TensorList, const Gates&, const Optional&, const Optional&,
                       const Optional&, const Optional&, const Optional&, at::IntArrayRef, at::IntArrayRef, bool, double);

// A multiversioned function may not be a template, hence one overload per element type.
#define HARMONICA_NORMALISE(T)                                                                                     \
  HARMONICA_MULTIVERSION void normalise(T* HARMONICA_RESTRICT out, const T* in, const T* factor, const T* offset,  \
                                        T mean, T inverse_deviation, int64_t n) {                                  \
    for (int64_t i = 0; i < n; ++i) out[i] = (in[i] - mean) * inverse_deviation * factor[i] + offset[i];           \
  }
HARMONICA_NORMALISE(float)
HARMONICA_NORMALISE(double)
#undef HARMONICA_NORMALISE

// `in`, `factor` and `offset` point into the first of two Planes; the second lies `second` numbers further on.
HARMONICA_MULTIVERSION void normalise(BFloat16* out, const float* in, const float* factor, const float* offset,
                                      float mean, float inverse_deviation, int64_t n, int64_t second) {
  const auto at = [=](int64_t i) HARMONICA_INLINE_LAMBDA {
    return (in[i] - mean) * inverse_deviation * factor[i] + offset[i];
  };
#pragma GCC ivdep
  for (int64_t pair = 0; pair < n / 2; ++pair) store_pair(out, pair, {at(pair), at(second + pair)});
  if (n % 2 == 1) store_first(out, n / 2, at(n / 2));
}

constexpr int64_t line = 64;

// Prefetches what lies `step` bytes after a part of a dense row; what will be read goes into the second-level cache.
HARMONICA_ALWAYS_INLINE void prefetch_next(const char* part, int64_t step, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(part + step + i, 0, 2);
}
HARMONICA_ALWAYS_INLINE void prefetch_next_to_write(char* part, int64_t step, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += line) __builtin_prefetch(part + step + i, 1);
}

// The positions of operands in an iterator over the rows; 0, the position of hidden, stands for an absent operand.
struct Operands {
  c10::SmallVector<int64_t, 32> stride;  // of each operand, along a row, in bytes
  c10::SmallVector<size_t, 16> gates;
  size_t scale = 0, shift = 0;
};

struct Norm {
  Optional weight, bias;
  bool rms;
  double eps;
  int64_t width;
};

int64_t bytes_along_row(const at::Tensor& t) {
  const bool is_one_number = t.dim() == 0 || t.size(-1) == 1;
  return is_one_number ? 0 : t.stride(-1) * t.element_size();
}

// Computes factor and offset for one row. An absent scale, shift or bias counts as 0, an absent weight as 1.
template <typename T, typename Acc>
void modulation(Acc* factor, Acc* offset, Strided<T> weight, Strided<T> bias, Strided<T> scale, Strided<T> shift,
                int64_t n) {
  const auto at = [](Strided<T> t, int64_t i, Acc absent) { return t.data ? Element<T>::load(t[i]) : absent; };
  for (int64_t i = 0; i < n; ++i) {
    const Acc scaled = Acc(1) + at(scale, i, 0);
    const int64_t to = std::is_same_v<T, BFloat16> ? i / 2 + i % 2 * ((n + 1) / 2) : i;  // as Planes lie
    factor[to] = at(weight, i, 1) * scaled;
    offset[to] = at(bias, i, 0) * scaled + at(shift, i, 0);
  }
}

// The operands of the iterator are hidden, out, x, the caches, and the gates, scale and shift that are present.
template <typename T>
void run(at::TensorIterator& iter, const Operands& operands, const Summands& summands, const Norm& norm) {
  using Acc = typename Element<T>::Acc;
  const auto vector = [](const Optional& t) {
    if (!t.has_value()) return Strided<T>{};
    return Strided<T>{static_cast<const char*>(t->const_data_ptr()), bytes_along_row(*t)};
  };
  const Strided<T> weight = vector(norm.weight), bias = vector(norm.bias);
  const Weighting<T> weighting(summands);
  const size_t count = summands.caches.size(), gates = operands.gates.size();
  const int64_t n = norm.width;

  // Normalising a piece of a row reads nothing from memory, so the same piece of the next row is prefetched meanwhile.
  // On Zen 4 this saves 10 to 25 % of the time (pieces of 64 to 384 numbers did equally well), but costs as much where
  // everything fits into the second-level caches.
  constexpr int64_t piece = 192, second_level = 1 << 20;
  const int64_t bytes_moved = iter.numel() * n * int64_t(sizeof(T)) * int64_t(3 + count);
  const bool fetches = bytes_moved > second_level * at::get_num_threads();

  const auto loop = [&](char** data, const int64_t* strides, int64_t rows) {
    // Vectors of 64 bytes that cross cache lines take twice as long.
    constexpr int64_t numbers = line / sizeof(Acc);
    const int64_t padded = (n + numbers - 1) / numbers * numbers;
    std::vector<Acc> buffer(4 * padded + numbers);
    void* start = buffer.data();
    size_t space = buffer.size() * sizeof(Acc);
    Acc* const factor = static_cast<Acc*>(std::align(line, 4 * padded * sizeof(Acc), start, space));
    Acc *const offset = factor + padded, *const wide = offset + padded, *sum = wide + padded;
    const bool is_one_modulation = (!operands.scale || strides[operands.scale] == 0) &&
                                   (!operands.shift || strides[operands.shift] == 0);
    c10::SmallVector<Strided<T>, 16> caches(count), gate(gates);
    for (int64_t row = 0; row < rows; ++row) {
      const auto at = [&](size_t i) { return data[i] + row * strides[i]; };
      const auto operand = [&](size_t i) { return i == 0 ? Strided<T>{} : Strided<T>{at(i), operands.stride[i]}; };
      for (size_t k = 0; k < count; ++k) caches[k] = operand(3 + k);
      for (size_t k = 0; k < gates; ++k) gate[k] = operand(operands.gates[k]);
      T *const hidden = reinterpret_cast<T*>(at(0)), *const out = reinterpret_cast<T*>(at(1));
      const auto add_up = [&](auto to) {
        residual_sum(to, operand(2), {caches.data(), gate.data(), int64_t(gates), weighting}, n);
      };
      if constexpr (std::is_same_v<T, BFloat16>) {
        add_up(RoundedAndExact{hidden, planes(sum, n)});
      } else {
        if constexpr (std::is_same_v<T, Acc>) sum = hidden;
        add_up(sum);
      }
      if constexpr (std::is_same_v<T, Float16>) narrow(hidden, sum, n);
      const Moments<Acc> of_row = moments(sum, n, norm.rms, norm.eps);
      if (row == 0 || !is_one_modulation)
        modulation(factor, offset, weight, bias, operand(operands.scale), operand(operands.shift), n);
      for (int64_t begin = 0; begin < n; begin += piece) {
        const int64_t length = std::min(piece, n - begin), bytes = length * int64_t(sizeof(T));
        const auto part = [&](size_t i) { return at(i) + begin * int64_t(sizeof(T)); };
        for (size_t i = 0; fetches && i < 2; ++i) prefetch_next_to_write(part(i), strides[i], bytes);
        for (size_t i = 2; fetches && i < 3 + count; ++i)
          if (operands.stride[i] == int64_t(sizeof(T))) prefetch_next(part(i), strides[i], bytes);
        const auto [mean, inverse_deviation] = of_row;
        if constexpr (std::is_same_v<T, BFloat16>) {
          const int64_t pair = begin / 2;
          normalise(out + begin, sum + pair, factor + pair, offset + pair, mean, inverse_deviation, length,
                    (n + 1) / 2);
        } else if constexpr (std::is_same_v<T, Float16>) {
          normalise(wide, sum + begin, factor + begin, offset + begin, mean, inverse_deviation, length);
          narrow(out + begin, wide, length);
        } else {
          normalise(out + begin, sum + begin, factor + begin, offset + begin, mean, inverse_deviation, length);
        }
      }
    }
  };
  iter.for_each(loop, std::max<int64_t>(1, at::internal::GRAIN_SIZE / n));
}

bool is_vector_for(const at::Tensor& x, const Optional& t) {
  return !t.has_value() || (is_like(x, *t) && t->dim() == 1 && t->size(0) == x.size(-1));
}

Results residual_reuse_norm_modulate(const at::Tensor& x, at::TensorList caches, const Gates& gates,
                                     const Optional& weight, const Optional& bias, const Optional& scale,
                                     const Optional& shift, const Optional& weights, at::IntArrayRef places,
                                     at::IntArrayRef counts, bool rms, double eps) {
  static const auto reference = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("harmonica::_residual_reuse_norm_modulate_reference", "")
                                    .typed<Signature>();
  const Summands terms{caches, in_memory(gates), weights, places, counts};
  if (x.dim() == 0 || !is_residual_sum(x, terms) || !is_vector_for(x, weight) || !is_vector_for(x, bias) ||
      !broadcasts_to(x, scale) || !broadcasts_to(x, shift))
    return reference.call(x, caches, terms.gates, weight, bias, scale, shift, weights, places, counts, rms, eps);
  at::Tensor hidden = at::empty(x.sizes(), x.options()), out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return {hidden, out};

  // The iterator visits the first number of each row.
  const auto first = [](const at::Tensor& t) { return t.dim() == 0 ? t : t.select(-1, 0); };
  at::TensorIteratorConfig config;
  config.resize_outputs(false).set_check_mem_overlap(false);
  config.add_owned_output(first(hidden)).add_owned_output(first(out));
  Operands operands;
  operands.stride.assign(2, x.element_size());
  const auto add = [&](const at::Tensor& t) {
    config.add_owned_const_input(first(t));
    operands.stride.push_back(bytes_along_row(t));
    return operands.stride.size() - 1;
  };
  const auto add_if_any = [&](const Optional& t) { return t.has_value() ? add(*t) : 0; };
  add(x);
  for (const at::Tensor& cache : caches) add(cache);
  for (const Optional& gate : terms.gates) operands.gates.push_back(add_if_any(gate));
  operands.scale = add_if_any(scale);
  operands.shift = add_if_any(shift);

  at::TensorIterator iter = config.build();
  const Norm norm{weight, bias, rms, eps, x.size(-1)};
  switch (x.scalar_type()) {
    case at::kFloat: run<float>(iter, operands, terms, norm); break;
    case at::kDouble: run<double>(iter, operands, terms, norm); break;
    case at::kBFloat16: run<BFloat16>(iter, operands, terms, norm); break;
    default: run<Float16>(iter, operands, terms, norm); break;
  }
  return {hidden, out};
}

}  // namespace

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("residual_reuse_norm_modulate", residual_reuse_norm_modulate); }

}  // namespace harmonica
