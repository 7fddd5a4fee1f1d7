// The numbers are processed in blocks, and the terms in groups. One loop reads all streams of a group; only sums of
// more terms than one group holds pass through a buffer, which stays in the first-level cache. Operands that are not
// dense in memory, and all fp16 operands (see float16.h), are first copied to buffers too.

#include "residual_sum.h"

#include <algorithm>
#include <array>
#include <cstddef>
#include <type_traits>
#include <utility>

#include "float16.h"
#include "multiversion.h"

namespace harmonica {
namespace {

// Terms per group. A pass over 8 terms has more pointers than x86 has registers, which costs less than a second pass.
// fp16 has all its streams in buffers, which the cache has to hold, so its groups are smaller.
template <typename T>
constexpr int64_t group = std::is_same_v<T, Float16> ? 4 : 8;

// Numbers per block. DiTs are 384 to 3072 wide in multiples of 384.
template <typename T>
constexpr int64_t block = std::is_same_v<T, Float16> ? 384 : 1536;

// Rows of many tensors are more streams than the hardware prefetches, and it prefetches nothing beyond a page. So data
// needed soon are prefetched into the first-level cache: without this, bf16 with 8 terms takes a quarter longer (Zen 4;
// 256 bytes ahead did best, of 256 to 2304). Data needed later are prefetched into the second level, which saves 5 to
// 10 % for fp32 and for sums with a norm (2304 bytes ahead did best, of 768 to 4608); bf16 alone gains nothing.
constexpr int64_t line = 64, soon = 256, later = 2304, step = 32;

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

// unroll 1: the compiler would first unroll a loop with a small constant count, and not vectorise what it unrolled.
template <bool weighted, typename Out, typename In, typename T, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const T* const* caches, const T* const* gates, const T* weights,
                                 int64_t n, std::index_sequence<k...>) {
  const T *const cache[] = {caches[k]...}, *const gate[] = {gates[k]...};
  const T weight[] = {(weighted ? weights[k] : T(1))...};
  in_steps(n, step, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, begin);
    (prefetch<Out>(cache[k], begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t i = begin; i < end; ++i) {
      T sum = in[i];
      const auto add_one = [&](T w, T g, T c) HARMONICA_INLINE_LAMBDA { sum = sum + (weighted ? w * (g * c) : g * c); };
      (add_one(weight[k], gate[k][i], cache[k][i]), ...);
      out[i] = sum;
    }
  });
}

template <bool weighted, typename Out, typename In, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const BFloat16* const* caches, const BFloat16* const* gates,
                                 const float* weights, int64_t n, std::index_sequence<k...>) {
  // Copies of the pointers: the compiler must assume that a store of bf16 may change the caller's arrays.
  const BFloat16 *const cache[] = {caches[k]...}, *const gate[] = {gates[k]...};
  const float weight[] = {(weighted ? weights[k] : 1.0f)...};
  in_steps(n / 2, step / 2, [&](int64_t begin, int64_t end) HARMONICA_INLINE_LAMBDA {
    prefetch<Out>(in, 2 * begin);
    (prefetch<Out>(cache[k], 2 * begin), ...);
#pragma GCC ivdep
#pragma GCC unroll 1
    for (int64_t pair = begin; pair < end; ++pair) {
      Pair sum = load_pair(in, pair);
      const auto add_one = [&](float w, Pair g, Pair c) HARMONICA_INLINE_LAMBDA {
        const Pair term = {g.first * c.first, g.second * c.second};
        sum.first = sum.first + (weighted ? w * term.first : term.first);
        sum.second = sum.second + (weighted ? w * term.second : term.second);
      };
      (add_one(weight[k], load_pair(gate[k], pair), load_pair(cache[k], pair)), ...);
      store_pair(out, pair, sum);
    }
  });
  if (n % 2 == 1) {
    float sum = load_first(in, n / 2);
    const auto add_one = [&](float w, float g, float c) HARMONICA_INLINE_LAMBDA {
      sum = sum + (weighted ? w * (g * c) : g * c);
    };
    (add_one(weight[k], load_first(gate[k], n / 2), load_first(cache[k], n / 2)), ...);
    store_first(out, n / 2, sum);
  }
}

// A multiversioned function may not be a template, hence one overload per combination of types. Null `weights` choose the
// loops without them.
#define HARMONICA_ADD_COUNTED(Name, weighted, Out, In, T, Acc)                                                      \
  HARMONICA_MULTIVERSION void Name(Out out, In in, const T* const* caches, const T* const* gates,                   \
                                   [[maybe_unused]] const Acc* weights, int64_t count, int64_t n) {                 \
    switch (count) {                                                                                                \
      case 1: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<1>{});              \
      case 2: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<2>{});              \
      case 3: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<3>{});              \
      case 4: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<4>{});              \
      case 5: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<5>{});              \
      case 6: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<6>{});              \
      case 7: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<7>{});              \
      default: return add<weighted>(out, in, caches, gates, weights, n, std::make_index_sequence<8>{});             \
    }                                                                                                               \
  }
#define HARMONICA_ADD(Out, In, T, Acc)                                                                              \
  HARMONICA_ADD_COUNTED(add_plain, false, Out, In, T, Acc)                                                          \
  HARMONICA_ADD_COUNTED(add_weighted, true, Out, In, T, Acc)                                                        \
  void add(Out out, In in, const T* const* caches, const T* const* gates, const Acc* weights, int64_t count,        \
           int64_t n) {                                                                                             \
    weights == nullptr ? add_plain(out, in, caches, gates, weights, count, n)                                       \
                       : add_weighted(out, in, caches, gates, weights, count, n);                                   \
  }
HARMONICA_ADD(float*, const float*, float, float)
HARMONICA_ADD(double*, const double*, double, double)
HARMONICA_ADD(BFloat16*, const BFloat16*, BFloat16, float)
HARMONICA_ADD(BFloat16*, Planes, BFloat16, float)
HARMONICA_ADD(Planes, const BFloat16*, BFloat16, float)
HARMONICA_ADD(Planes, Planes, BFloat16, float)
HARMONICA_ADD(RoundedAndExact, const BFloat16*, BFloat16, float)
HARMONICA_ADD(RoundedAndExact, Planes, BFloat16, float)
#undef HARMONICA_ADD
#undef HARMONICA_ADD_COUNTED

template <typename T>
using Staged = std::conditional_t<std::is_same_v<T, Float16>, float, T>;

template <typename T>
const Staged<T>* stage(Strided<T> from, Staged<T>* buffer, int64_t n) {
  if constexpr (std::is_same_v<T, Float16>) {
    if (from.is_dense()) {
      widen(buffer, &from[0], n);
    } else {
      for (int64_t i = 0; i < n; ++i) buffer[i] = Element<Float16>::load(from[i]);
    }
    return buffer;
  } else {
    if (from.is_dense()) return &from[0];
    for (int64_t i = 0; i < n; ++i) buffer[i] = from[i];
    return buffer;
  }
}

template <typename T>
const Staged<T>* ones() {
  static const auto numbers = [] {
    std::array<Staged<T>, block<T>> filled;
    filled.fill(Element<Staged<T>>::one);
    return filled;
  }();
  return numbers.data();
}

template <typename T>
struct Buffers {
  using S = Staged<T>;
  using Acc = typename Element<T>::Acc;
  alignas(64) S x[block<T>];
  alignas(64) S caches[group<T>][block<T>];
  alignas(64) S gates[group<T>][block<T>];
  alignas(64) Acc sum[block<T>];
  alignas(64) Acc last[block<T>];

  auto sum_cursor(int64_t n) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      return planes(sum, n);
    } else {
      return &sum[0];
    }
  }
};

template <typename T, typename Out>
void sum_of_block(Out out, Strided<T> x, const Term<T>* terms, const typename Element<T>::Acc* weights, int64_t count,
                  int64_t begin, int64_t n, Buffers<T>& buffers) {
  using S = Staged<T>;
  const S* const first = stage(x.from(begin), buffers.x, n);
  const auto sum = buffers.sum_cursor(n);
  for (int64_t done = 0; done < count; done += group<T>) {
    const int64_t now = std::min(group<T>, count - done);
    const S *caches[group<T>], *gates[group<T>];
    for (int64_t k = 0; k < now; ++k) {
      const Term<T>& term = terms[done + k];
      caches[k] = stage(term.cache.from(begin), buffers.caches[k], n);
      gates[k] = term.gate.data ? stage(term.gate.from(begin), buffers.gates[k], n) : ones<T>();
    }
    const auto* const factors = weights == nullptr ? nullptr : weights + done;
    const bool is_last = done + now == count;
    if (done == 0 && is_last) {
      add(out, first, caches, gates, factors, now, n);
    } else if (done == 0) {
      add(sum, first, caches, gates, factors, now, n);
    } else if (is_last) {
      add(out, sum, caches, gates, factors, now, n);
    } else {
      add(sum, sum, caches, gates, factors, now, n);
    }
  }
}

template <typename T>
T* part(T* row, int64_t begin) {
  return row + begin;
}
Planes part(Planes row, int64_t begin) { return {row.first + begin / 2, row.second + begin / 2}; }
RoundedAndExact part(RoundedAndExact row, int64_t begin) {
  return {part(row.rounded, begin), part(row.exact, begin)};
}

}  // namespace

template <typename T, typename Out>
void residual_sum(Out out, Strided<T> x, const Term<T>* terms, const typename Element<T>::Acc* weights, int64_t count,
                  int64_t n) {
  Buffers<T> buffers;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t length = std::min(block<T>, n - begin);
    if constexpr (std::is_same_v<Out, Float16*>) {
      sum_of_block(&buffers.last[0], x, terms, weights, count, begin, length, buffers);
      narrow(out + begin, buffers.last, length);
    } else {
      sum_of_block(part(out, begin), x, terms, weights, count, begin, length, buffers);
    }
  }
}

template void residual_sum(float*, Strided<float>, const Term<float>*, const float*, int64_t, int64_t);
template void residual_sum(double*, Strided<double>, const Term<double>*, const double*, int64_t, int64_t);
template void residual_sum(BFloat16*, Strided<BFloat16>, const Term<BFloat16>*, const float*, int64_t, int64_t);
template void residual_sum(Float16*, Strided<Float16>, const Term<Float16>*, const float*, int64_t, int64_t);
template void residual_sum(RoundedAndExact, Strided<BFloat16>, const Term<BFloat16>*, const float*, int64_t, int64_t);
template void residual_sum(float*, Strided<Float16>, const Term<Float16>*, const float*, int64_t, int64_t);

}  // namespace harmonica
