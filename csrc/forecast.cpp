// out = sum_k w_k * cache_k on the CPU, in one pass over memory, equal to the reference bit for bit.
//
// TensorIterator merges dimensions and splits the work over ATen's thread pool. The loops take up to four caches.

#include <ATen/Functions.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "arguments.h"
#include "element.h"
#include "float16.h"
#include "multiversion.h"

namespace harmonica {
namespace {

constexpr int64_t most = 4;  // caches

template <typename T, size_t... k>
HARMONICA_ALWAYS_INLINE void sum(T* HARMONICA_RESTRICT out, const T* const* caches, const T* weights, int64_t n,
                                 std::index_sequence<0, k...>) {
  const T* const cache[] = {caches[0], caches[k]...};
  const T weight[] = {weights[0], weights[k]...};
#pragma GCC unroll 1
  for (int64_t i = 0; i < n; ++i) {
    T total = weight[0] * cache[0][i];
    ((total = total + weight[k] * cache[k][i]), ...);
    out[i] = total;
  }
}

template <size_t... k>
HARMONICA_ALWAYS_INLINE void sum(BFloat16* out, const BFloat16* const* caches, const float* weights, int64_t n,
                                 std::index_sequence<0, k...>) {
  // Copies: the compiler must assume that a store of bf16 may change the caller's arrays.
  const BFloat16* const cache[] = {caches[0], caches[k]...};
  const float weight[] = {weights[0], weights[k]...};
#pragma GCC ivdep
#pragma GCC unroll 1
  for (int64_t pair = 0; pair < n / 2; ++pair) {
    const Pair first = load_pair(cache[0], pair);
    Pair total = {weight[0] * first.first, weight[0] * first.second};
    [[maybe_unused]] const auto add_one = [&](float w, Pair c) HARMONICA_INLINE_LAMBDA {
      total.first = total.first + w * c.first;
      total.second = total.second + w * c.second;
    };
    (add_one(weight[k], load_pair(cache[k], pair)), ...);
    store_pair(out, pair, total);
  }
  if (n % 2 == 1) {
    float total = weight[0] * load_first(cache[0], n / 2);
    ((total = total + weight[k] * load_first(cache[k], n / 2)), ...);
    store_first(out, n / 2, total);
  }
}

// A multiversioned function may not be a template, hence one overload per element type.
#define HARMONICA_SUM(T, Acc)                                                                                       \
  HARMONICA_MULTIVERSION void sum_of(T* out, const T* const* caches, const Acc* weights, int64_t count, int64_t n) { \
    switch (count) {                                                                                                \
      case 1: return sum(out, caches, weights, n, std::make_index_sequence<1>{});                                   \
      case 2: return sum(out, caches, weights, n, std::make_index_sequence<2>{});                                   \
      case 3: return sum(out, caches, weights, n, std::make_index_sequence<3>{});                                   \
      default: return sum(out, caches, weights, n, std::make_index_sequence<most>{});                               \
    }                                                                                                               \
  }
HARMONICA_SUM(float, float)
HARMONICA_SUM(double, double)
HARMONICA_SUM(BFloat16, float)
#undef HARMONICA_SUM

// fp16 goes through fp32 buffers that stay in the first-level cache.
void sum_of(Float16* out, const Float16* const* caches, const float* weights, int64_t count, int64_t n) {
  constexpr int64_t block = 512;
  float total[block], wide[most][block];
  const float* rows[most];
  for (int64_t begin = 0; begin < n; begin += block) {
    const int64_t length = std::min(block, n - begin);
    for (int64_t k = 0; k < count; ++k) {
      widen(wide[k], caches[k] + begin, length);
      rows[k] = wide[k];
    }
    sum_of(total, rows, weights, count, length);
    narrow(out + begin, total, length);
  }
}

template <typename T>
void run(at::TensorIterator& iter, const at::Tensor& weights, at::IntArrayRef places) {
  const int64_t count = int64_t(places.size());
  const auto factors = weights_at<typename Element<T>::Acc>(weights, places, places.size());
  iter.for_each([&](char** data, const int64_t* strides, int64_t n) {
    const T* caches[most];
    const auto point = [&](int64_t i) {
      for (int64_t k = 0; k < count; ++k) caches[k] = reinterpret_cast<const T*>(data[1 + k] + i * strides[1 + k]);
    };
    const bool is_dense = std::all_of(strides, strides + 1 + count, [](int64_t s) { return s == int64_t(sizeof(T)); });
    const int64_t length = is_dense ? n : 1;  // other strides: correct, but not vectorised
    for (int64_t i = 0; i < n; i += length) {
      point(i);
      sum_of(reinterpret_cast<T*>(data[0] + i * strides[0]), caches, factors.data(), count, length);
    }
  });
}

using Signature = at::Tensor(at::TensorList, const at::Tensor&, at::IntArrayRef);

at::Tensor forecast(at::TensorList caches, const at::Tensor& weights, at::IntArrayRef places) {
  static const auto reference =
      c10::Dispatcher::singleton().findSchemaOrThrow("harmonica::_forecast_reference", "").typed<Signature>();
  bool is_taken = !caches.empty() && caches.size() <= size_t(most) && is_known(caches[0]) &&
                  are_weights(caches[0], weights, places, caches.size());
  for (size_t k = 1; is_taken && k < caches.size(); ++k) is_taken = has_shape_of(caches[0], caches[k]);
  if (!is_taken) return reference.call(caches, weights, places);
  at::Tensor out = at::empty_like(caches[0]);
  if (out.numel() == 0) return out;

  at::TensorIteratorConfig config;
  config.resize_outputs(false).set_check_mem_overlap(false).add_output(out);
  for (const at::Tensor& cache : caches) config.add_const_input(cache);
  at::TensorIterator iter = config.build();
  switch (out.scalar_type()) {
    case at::kFloat: run<float>(iter, weights, places); break;
    case at::kDouble: run<double>(iter, weights, places); break;
    case at::kBFloat16: run<BFloat16>(iter, weights, places); break;
    default: run<Float16>(iter, weights, places); break;
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(harmonica, CPU, m) { m.impl("forecast", forecast); }

}  // namespace harmonica
