// out = rotate(norm(x) * weight + bias) for parts x of queries and keys on the CPU, in one pass over memory.
//
// Rows go through buffers that stay in the first-level cache. What does not change from row to row is brought into the
// form of rotary_row.h once: weight and bias per part, cos and sin for all heads of a token.

#include <ATen/Functions.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <string_view>
#include <type_traits>
#include <vector>

#include "arguments.h"
#include "moments.h"
#include "rotary_arguments.h"
#include "rotary_row.h"

namespace harmonica {
namespace {

// Numbers of any of the types that tables have, in the type of the arithmetic.
template <typename Acc>
Acc number(at::ScalarType type, const char* at) {
  switch (type) {
    case at::kFloat: return Acc(*reinterpret_cast<const float*>(at));
    case at::kDouble: return Acc(*reinterpret_cast<const double*>(at));
    case at::kBFloat16: return Acc(Element<BFloat16>::load(*reinterpret_cast<const BFloat16*>(at)));
    default: return Acc(Element<Float16>::load(*reinterpret_cast<const Float16*>(at)));
  }
}

// Where a row of a weight, a bias or a table lies and how; a table may have one number per pair.
struct Vector {
  const char* data = nullptr;
  at::ScalarType type = at::kFloat;
  int64_t step = 0;  // bytes
  bool is_per_pair = false;
};

// The halves of a row: where they lie, or copied to `buffer` (2 * half numbers).
template <typename Acc>
Halves<Acc> halves_of(const Vector& row, Acc* buffer, int64_t half, bool interleaved) {
  const bool is_dense = row.type == c10::CppTypeToScalarType<Acc>::value && row.step == int64_t(sizeof(Acc));
  const Acc* const dense = reinterpret_cast<const Acc*>(row.data);
  if (is_dense && row.is_per_pair) return {dense, dense};
  if (is_dense && !interleaved) return {dense, dense + half};
  if (is_dense) {
    take_apart(buffer, buffer + half, dense, half, interleaved);
    return {buffer, buffer + half};
  }
  const auto at = [&](int64_t i) { return number<Acc>(row.type, row.data + i * row.step); };
  if (row.is_per_pair) {
    for (int64_t i = 0; i < half; ++i) buffer[i] = at(i);
    return {buffer, buffer};
  }
  for (int64_t i = 0; i < half; ++i) {
    buffer[i] = at(interleaved ? 2 * i : i);
    buffer[half + i] = at(interleaved ? 2 * i + 1 : half + i);
  }
  return {buffer, buffer + half};
}

// A weight or bias for every row of a norm: `rows` times the halves of a row, or `absent` everywhere.
template <typename Acc>
std::vector<Acc> vector_of(const std::optional<at::Tensor>& given, const Rows& rows, Acc absent, bool interleaved) {
  std::vector<Acc> numbers(rows.normed * rows.width, absent);
  if (!given.has_value()) return numbers;
  const at::Tensor wide = given->to(c10::CppTypeToScalarType<Acc>::value).contiguous();
  const Acc* const data = wide.const_data_ptr<Acc>();
  const int64_t half = rows.width / 2;
  for (int64_t row = 0; row < rows.normed; ++row) {
    Acc* const to = numbers.data() + row * rows.width;
    const Acc* const from = data + row * rows.width;
    interleaved ? take_apart(to, to + half, from, half, true) : void(std::copy_n(from, rows.width, to));
  }
  return numbers;
}

// Buffers of one thread, each beginning at a cache line: vectors that cross one take twice as long.
template <typename Acc>
struct Buffers {
  explicit Buffers(const Rows& rows) : padded((rows.width + 15) / 16 * 16), memory((rows.normed + 4) * padded + 16) {
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    start = memory.data() + (64 - address % 64) % 64 / sizeof(Acc);
  }
  Acc* cos() { return start; }
  Acc* sin() { return start + padded; }
  Acc* wide() { return start + 2 * padded; }
  Acc* x() { return start + 3 * padded; }  // `normed` rows without gaps

  int64_t padded;
  std::vector<Acc> memory;
  Acc* start;
};

template <typename T, typename Acc>
void load_row(Acc* to, const char* from, const Rows& rows, Acc* wide, bool interleaved) {
  const int64_t n = rows.width, half = n / 2;
  const T* const row = reinterpret_cast<const T*>(from);
  if (rows.x.step != int64_t(sizeof(T))) {
    const auto at = [&](int64_t i) { return Element<T>::load(*reinterpret_cast<const T*>(from + i * rows.x.step)); };
    for (int64_t i = 0; i < n; ++i) to[interleaved ? i / 2 + i % 2 * half : i] = at(i);
  } else if constexpr (std::is_same_v<T, Float16>) {
    widen(interleaved ? wide : to, row, n);
    if (interleaved) take_apart(to, to + half, wide, half, true);
  } else {
    take_apart(to, to + half, row, half, interleaved);
    if (n % 2 == 1) to[n - 1] = Element<T>::load(row[n - 1]);
  }
}

template <typename T, typename Acc>
void store_row(T* out, const RotaryRow<Acc>& row, const Rows& rows, Acc* wide, bool rotates, bool interleaved) {
  if constexpr (std::is_same_v<T, Float16>) {
    store_row(wide, row, rows, wide, rotates, interleaved);
    narrow(out, wide, rows.width);
  } else {
    rotates ? turn(out, row, rows.width / 2, interleaved) : scale_only(out, row, rows.width);
  }
}

template <typename T>
void run(const Part& part, const Rows& rows, const RotarySettings& settings) {
  using Acc = typename Element<T>::Acc;
  const bool rotates = part.cos.has_value(), interleaved = rotates && settings.interleaved;
  const int64_t n = rows.width, half = n / 2, normed = rows.normed;
  const std::vector<Acc> weight = vector_of<Acc>(part.weight, rows, Acc(1), interleaved);
  const std::vector<Acc> bias = vector_of<Acc>(part.bias, rows, Acc(0), interleaved);
  const auto vector_at = [&](const Place& table, const std::optional<at::Tensor>& t, int64_t row) {
    return Vector{table.at(rows, row), t->scalar_type(), table.step, t->size(-1) != n};
  };

  const int64_t groups = rows.count / normed;
  at::parallel_for(0, groups, std::max<int64_t>(1, at::internal::GRAIN_SIZE / (n * normed)), [&](int64_t begin,
                                                                                               int64_t end) {
    Buffers<Acc> buffers(rows);
    RotaryRow<Acc> of_row;
    const char *last_cos = nullptr, *last_sin = nullptr;
    for (int64_t group = begin; group < end; ++group) {
      for (int64_t k = 0; k < normed; ++k) {
        const char* const from = rows.x.at(rows, group * normed + k);
        load_row<T>(buffers.x() + k * n, from, rows, buffers.wide(), interleaved);
      }
      if (settings.norm != Norm::none) {
        const auto [mean, inverse] = moments(buffers.x(), normed * n, settings.norm == Norm::rms, settings.eps);
        of_row.mean = mean;
        of_row.inverse = inverse;
      }
      for (int64_t k = 0; k < normed; ++k) {
        const int64_t row = group * normed + k, offset = k * n;
        const auto halves = [&](const Acc* numbers) { return Halves<Acc>{numbers, numbers + half}; };
        of_row.x = halves(buffers.x() + offset);
        of_row.weight = halves(weight.data() + offset);
        of_row.bias = halves(bias.data() + offset);
        if (rotates) {
          const Vector cos = vector_at(rows.cos, part.cos, row), sin = vector_at(rows.sin, part.sin, row);
          if (cos.data != last_cos) of_row.cos = halves_of(cos, buffers.cos(), half, interleaved);
          if (sin.data != last_sin) of_row.sin = halves_of(sin, buffers.sin(), half, interleaved);
          last_cos = cos.data;
          last_sin = sin.data;
        }
        T* const out = reinterpret_cast<T*>(const_cast<char*>(rows.out.at(rows, row)));
        store_row(out, of_row, rows, buffers.wide(), rotates, interleaved);
      }
    }
  });
}

std::vector<at::Tensor> norm_rotary(at::TensorList parts, at::IntArrayRef counts, const Gates& given_weights,
                                    const Gates& given_biases, const Gates& given_cos, const Gates& given_sin,
                                    int64_t dim, c10::string_view norm, bool across, double eps, bool interleaved) {
  const Gates weights = in_memory(given_weights), biases = in_memory(given_biases);
  const Gates cos = in_memory(given_cos), sin = in_memory(given_sin);
  const std::optional<RotarySettings> settings = settings_of(dim, norm, across, eps, interleaved);
  if (!settings || !is_rotary_call(parts, counts, {weights, biases, cos, sin}, *settings)) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("harmonica::_norm_rotary_reference", "")
                               .typed<decltype(norm_rotary)>();
    return op.call(parts, counts, weights, biases, cos, sin, dim, norm, across, eps, interleaved);
  }
  std::vector<at::Tensor> results;
  size_t index = 0;
  for (const int64_t count : counts) {
    std::vector<int64_t> shape = parts[index].sizes().vec();
    for (int64_t i = 1; i < count; ++i) shape[dim] += parts[index + i].size(dim);
    results.push_back(at::empty(shape, parts[0].options()));
    int64_t start = 0;
    for (const size_t end = index + count; index < end; ++index) {
      const at::Tensor& x = parts[index];
      const at::Tensor out = results.back().narrow(dim, start, x.size(dim));
      start += x.size(dim);
      if (x.numel() == 0) continue;
      const Part part{x, weights.get(index), biases.get(index), cos.get(index), sin.get(index)};
      const Rows rows(part, out, across);
      switch (x.scalar_type()) {
        case at::kFloat: run<float>(part, rows, *settings); break;
        case at::kDouble: run<double>(part, rows, *settings); break;
        case at::kBFloat16: run<BFloat16>(part, rows, *settings); break;
        default: run<Float16>(part, rows, *settings); break;
      }
    }
  }
  return results;
}

}  // namespace

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("norm_rotary", norm_rotary); }

}  // namespace harmonica
