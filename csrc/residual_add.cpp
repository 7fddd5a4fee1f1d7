// out = in + sum_k gate_k * cache_k over dense rows.

#include "residual_add.h"

#include <cstddef>
#include <utility>

namespace harmonica {
namespace {

// unroll 1: the compiler would first unroll a loop with a small constant count, and not vectorise what it unrolled.
template <typename Out, typename In, typename T, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const T* const* caches, const T* const* gates, int64_t n,
                                 std::index_sequence<k...>) {
  const T *const cache[] = {caches[k]...}, *const gate[] = {gates[k]...};
  in_steps(n, step, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, begin);
    (prefetch<Out>(cache[k], begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = begin; i < end; ++i) {
      T sum = in[i];
      ((sum = sum + gate[k][i] * cache[k][i]), ...);
      out[i] = sum;
    }
  });
}

template <typename Out, typename In, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const BFloat16* const* caches, const BFloat16* const* gates,
                                 int64_t n, std::index_sequence<k...>) {
  // Copies of the pointers: the compiler must assume that a store of bf16 may change the caller's arrays.
  const BFloat16 *const cache[] = {caches[k]...}, *const gate[] = {gates[k]...};
  in_steps(n / 2, step / 2, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, 2 * begin);
    (prefetch<Out>(cache[k], 2 * begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t pair = begin; pair < end; ++pair) {
      Pair sum = load_pair(in, pair);
      const auto add_one = [&](Pair g, Pair c) HARMONICA_INLINE_LAMBDA {
        sum.first = sum.first + g.first * c.first;
        sum.second = sum.second + g.second * c.second;
      };
      (add_one(load_pair(gate[k], pair), load_pair(cache[k], pair)), ...);
      store_pair(out, pair, sum);
    }
  });
  if (n % 2 == 1) {
    float sum = load_first(in, n / 2);
    ((sum = sum + load_first(gate[k], n / 2) * load_first(cache[k], n / 2)), ...);
    store_first(out, n / 2, sum);
  }
}

}  // namespace

#define HARMONICA_ADD(Out, In, T, Acc)                                                                             \
  HARMONICA_MULTIVERSION void add(Out out, In in, const T* const* caches, const T* const* gates, int64_t count,    \
                                  int64_t n) {                                                                     \
    switch (count) {                                                                                               \
      case 1: return add(out, in, caches, gates, n, std::make_index_sequence<1>{});                                \
      case 2: return add(out, in, caches, gates, n, std::make_index_sequence<2>{});                                \
      case 3: return add(out, in, caches, gates, n, std::make_index_sequence<3>{});                                \
      case 4: return add(out, in, caches, gates, n, std::make_index_sequence<4>{});                                \
      case 5: return add(out, in, caches, gates, n, std::make_index_sequence<5>{});                                \
      case 6: return add(out, in, caches, gates, n, std::make_index_sequence<6>{});                                \
      case 7: return add(out, in, caches, gates, n, std::make_index_sequence<7>{});                                \
      default: return add(out, in, caches, gates, n, std::make_index_sequence<8>{});                               \
    }                                                                                                              \
  }
HARMONICA_FOR_TYPES(HARMONICA_ADD)
#undef HARMONICA_ADD

}  // namespace harmonica
