// out = in + sum_k gate_k * cache_k over dense rows, for so many caches as one loop reads at once; and the same with a
// weighted sum of caches in the place of each. Both have a file of their own.
#pragma once

#include <cstdint>
#include <type_traits>

#include "element.h"
#include "multiversion.h"

namespace harmonica {

// Rows of many tensors are more streams than the hardware prefetches, and it prefetches nothing beyond a page. So data
// needed soon are prefetched into the first-level cache: without this, bf16 with 8 terms takes a quarter longer (Zen 4;
// 256 bytes ahead did best, of 256 to 2304). Data needed later are prefetched into the second level, which saves 5 to
// 10 % for fp32 and for sums with a norm (2304 bytes ahead did best, of 768 to 4608); bf16 alone gains nothing.
inline constexpr int64_t line = 64, soon = 256, later = 2304, step = 32;

template <typename Out>
constexpr bool looks_far = !std::is_same_v<Out, BFloat16*>;

template <typename Out, typename T>
HARMONICA_ALWAYS_INLINE void prefetch(const T* row, int64_t begin) {
  const char* const bytes = reinterpret_cast<const char*>(row + begin);
  for (int64_t i = 0; i < step * int64_t(sizeof(T)); i += line) {
    __builtin_prefetch(bytes + soon + i);
    if constexpr (looks_far<Out>) __builtin_prefetch(bytes + later + i, 0, 2);
  }
}
template <typename Out>
HARMONICA_ALWAYS_INLINE void prefetch(Planes, int64_t) {}  // a buffer, in the cache already

// Calls `some(begin, end)` for each piece of `length` of the n numbers, and for the rest.
template <typename Some>
HARMONICA_ALWAYS_INLINE void in_steps(int64_t n, int64_t length, Some some) {
  int64_t begin = 0;
  for (; begin + length <= n; begin += length) some(begin, begin + length);
  some(begin, n);
}

// A multiversioned function may not be a template, hence one overload per combination of types.
//
// add: 1 to 8 caches, each with a gate. add_weighted: `count` gates, and for each gate the sum of `per` caches multiplied
// by their weights; count is 1 to 4 if per is 1 or 2, and 1 or 2 if per is 3 or 4.
#define HARMONICA_FOR_TYPES(Do)                         \
  Do(float*, const float*, float, float)               \
  Do(double*, const double*, double, double)           \
  Do(BFloat16*, const BFloat16*, BFloat16, float)      \
  Do(BFloat16*, Planes, BFloat16, float)               \
  Do(Planes, const BFloat16*, BFloat16, float)         \
  Do(Planes, Planes, BFloat16, float)                  \
  Do(RoundedAndExact, const BFloat16*, BFloat16, float) \
  Do(RoundedAndExact, Planes, BFloat16, float)
#define HARMONICA_DECLARE(Out, In, T, Acc)                                                                       \
  void add(Out out, In in, const T* const* caches, const T* const* gates, int64_t count, int64_t n);             \
  void add_weighted(Out out, In in, const T* const* caches, const T* const* gates, int64_t count,                \
                    const Acc* weights, int64_t per, int64_t n);
HARMONICA_FOR_TYPES(HARMONICA_DECLARE)
#undef HARMONICA_DECLARE

}  // namespace harmonica
