// out = in + sum_k gate_k * y_k over dense rows, where y_k is the sum of some caches multiplied by their weights.

#include "residual_add.h"

#include <cstddef>
#include <utility>

namespace harmonica {
namespace {

template <typename T, size_t... j>
HARMONICA_ALWAYS_INLINE T weighted(const T* const* cache, const T* weight, int64_t i, std::index_sequence<0, j...>) {
  T sum = weight[0] * cache[0][i];
  ((sum = sum + weight[j] * cache[j][i]), ...);
  return sum;
}

template <size_t per, typename Out, typename In, typename T, size_t... k, size_t... c>
HARMONICA_ALWAYS_INLINE void add_some(Out out, In in, const T* const* caches, const T* const* gates,
                                      const T* weights, int64_t n, std::index_sequence<k...>,
                                      std::index_sequence<c...>) {
  const T *const cache[] = {caches[c]...}, *const gate[] = {gates[k]...};
  const T weight[] = {weights[c]...};
  in_steps(n, step, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, begin);
    (prefetch<Out>(cache[c], begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = begin; i < end; ++i) {
      T sum = in[i];
      ((sum = sum + gate[k][i] * weighted(cache + k * per, weight + k * per, i, std::make_index_sequence<per>{})), ...);
      out[i] = sum;
    }
  });
}

template <size_t... j>
HARMONICA_ALWAYS_INLINE Pair weighted_pair(const BFloat16* const* cache, const float* weight, int64_t pair,
                                       std::index_sequence<0, j...>) {
  const Pair first = load_pair(cache[0], pair);
  Pair sum = {weight[0] * first.first, weight[0] * first.second};
  [[maybe_unused]] const auto add_one = [&](float w, Pair c) HARMONICA_INLINE_LAMBDA {
    sum.first = sum.first + w * c.first;
    sum.second = sum.second + w * c.second;
  };
  (add_one(weight[j], load_pair(cache[j], pair)), ...);
  return sum;
}

template <size_t... j>
HARMONICA_ALWAYS_INLINE float weighted_first(const BFloat16* const* cache, const float* weight, int64_t pair,
                                         std::index_sequence<0, j...>) {
  float sum = weight[0] * load_first(cache[0], pair);
  ((sum = sum + weight[j] * load_first(cache[j], pair)), ...);
  return sum;
}

template <size_t per, typename Out, typename In, size_t... k, size_t... c>
HARMONICA_ALWAYS_INLINE void add_some(Out out, In in, const BFloat16* const* caches, const BFloat16* const* gates,
                                      const float* weights, int64_t n, std::index_sequence<k...>,
                                      std::index_sequence<c...>) {
  const BFloat16 *const cache[] = {caches[c]...}, *const gate[] = {gates[k]...};
  const float weight[] = {weights[c]...};
  constexpr std::make_index_sequence<per> each;
  in_steps(n / 2, step / 2, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, 2 * begin);
    (prefetch<Out>(cache[c], 2 * begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t pair = begin; pair < end; ++pair) {
      Pair sum = load_pair(in, pair);
      const auto add_one = [&](Pair g, Pair y) HARMONICA_INLINE_LAMBDA {
        sum.first = sum.first + g.first * y.first;
        sum.second = sum.second + g.second * y.second;
      };
      (add_one(load_pair(gate[k], pair), weighted_pair(cache + k * per, weight + k * per, pair, each)), ...);
      store_pair(out, pair, sum);
    }
  });
  if (n % 2 == 1) {
    float sum = load_first(in, n / 2);
    ((sum = sum + load_first(gate[k], n / 2) * weighted_first(cache + k * per, weight + k * per, n / 2, each)), ...);
    store_first(out, n / 2, sum);
  }
}

}  // namespace

#define HARMONICA_CASE(count, per)                                                                       \
  case 8 * per + count:                                                                                  \
    return add_some<per>(out, in, caches, gates, weights, n, std::make_index_sequence<count>{},          \
                         std::make_index_sequence<count * per>{});
#define HARMONICA_ADD(Out, In, T, Acc)                                                                   \
  HARMONICA_MULTIVERSION void add_weighted(Out out, In in, const T* const* caches, const T* const* gates, \
                                           int64_t count, const Acc* weights, int64_t per, int64_t n) {  \
    switch (8 * per + count) {                                                                           \
      HARMONICA_CASE(1, 1) HARMONICA_CASE(2, 1) HARMONICA_CASE(3, 1) HARMONICA_CASE(4, 1)                \
      HARMONICA_CASE(1, 2) HARMONICA_CASE(2, 2) HARMONICA_CASE(3, 2) HARMONICA_CASE(4, 2)                \
      HARMONICA_CASE(1, 3) HARMONICA_CASE(2, 3) HARMONICA_CASE(1, 4) HARMONICA_CASE(2, 4)                \
    }                                                                                                    \
  }
HARMONICA_FOR_TYPES(HARMONICA_ADD)
#undef HARMONICA_ADD
#undef HARMONICA_CASE

}  // namespace harmonica
