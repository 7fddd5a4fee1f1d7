// The numbers are taken in blocks, and the terms in groups. Of a group all streams are read in one loop, and only runs
// of more terms than a group has pass through a buffer, which stays in the first-level cache. What does not lie densely
// in memory, and all fp16 (see float16.h), is first copied to a buffer too.

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

constexpr int64_t group = 4;  // with gates ten streams: more pointers than that are more than x86 has registers

// DiTs are 384 to 3072 wide in multiples of 384. fp16 has all its streams in buffers, which the cache has to hold.
template <typename T>
constexpr int64_t block = std::is_same_v<T, Float16> ? 384 : 1536;

template <typename Out, typename In, typename T, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const T* const* caches, const T* const* gates, int64_t n,
                                 std::index_sequence<k...>) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T sum = in[i];
    ((sum = sum + gates[k][i] * caches[k][i]), ...);
    out[i] = sum;
  }
}

template <typename Out, typename In, size_t... k>
HARMONICA_ALWAYS_INLINE void add(Out out, In in, const BFloat16* const* caches, const BFloat16* const* gates,
                                 int64_t n, std::index_sequence<k...>) {
  // The compiler has to take a store of bf16 for one that could change these arrays, unless they are its own.
  const BFloat16 *const cache[] = {caches[k]...}, *const gate[] = {gates[k]...};
#pragma GCC ivdep
  for (int64_t pair = 0; pair < n / 2; ++pair) {
    Pair sum = load_pair(in, pair);
    const auto add_one = [&](Pair g, Pair c) HARMONICA_INLINE_LAMBDA {
      sum.first = sum.first + g.first * c.first;
      sum.second = sum.second + g.second * c.second;
    };
    (add_one(load_pair(gate[k], pair), load_pair(cache[k], pair)), ...);
    store_pair(out, pair, sum);
  }
  if (n % 2 == 1) {
    float sum = load_first(in, n / 2);
    ((sum = sum + load_first(gate[k], n / 2) * load_first(cache[k], n / 2)), ...);
    store_first(out, n / 2, sum);
  }
}

// A multiversioned function may not be a template, hence one overload per combination of types.
#define HARMONICA_ADD(Out, In, T)                                                                                   \
  HARMONICA_MULTIVERSION void add(Out out, In in, const T* const* caches, const T* const* gates, int64_t count,     \
                                  int64_t n) {                                                                      \
    switch (count) {                                                                                                \
      case 1: return add(out, in, caches, gates, n, std::make_index_sequence<1>{});                                 \
      case 2: return add(out, in, caches, gates, n, std::make_index_sequence<2>{});                                 \
      case 3: return add(out, in, caches, gates, n, std::make_index_sequence<3>{});                                 \
      default: return add(out, in, caches, gates, n, std::make_index_sequence<group>{});                            \
    }                                                                                                               \
  }
HARMONICA_ADD(float*, const float*, float)
HARMONICA_ADD(double*, const double*, double)
HARMONICA_ADD(BFloat16*, const BFloat16*, BFloat16)
HARMONICA_ADD(BFloat16*, Planes, BFloat16)
HARMONICA_ADD(Planes, const BFloat16*, BFloat16)
HARMONICA_ADD(Planes, Planes, BFloat16)
#undef HARMONICA_ADD

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
  alignas(64) S caches[group][block<T>];
  alignas(64) S gates[group][block<T>];
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
void sum_of_block(Out out, Strided<T> x, const Term<T>* terms, int64_t count, int64_t begin, int64_t n,
                  Buffers<T>& buffers) {
  using S = Staged<T>;
  const S* const first = stage(x.from(begin), buffers.x, n);
  const auto sum = buffers.sum_cursor(n);
  for (int64_t done = 0; done < count; done += group) {
    const int64_t now = std::min(group, count - done);
    const S *caches[group], *gates[group];
    for (int64_t k = 0; k < now; ++k) {
      const Term<T>& term = terms[done + k];
      caches[k] = stage(term.cache.from(begin), buffers.caches[k], n);
      gates[k] = term.gate.data ? stage(term.gate.from(begin), buffers.gates[k], n) : ones<T>();
    }
    const bool is_last = done + now == count;
    if (done == 0 && is_last) {
      add(out, first, caches, gates, now, n);
    } else if (done == 0) {
      add(sum, first, caches, gates, now, n);
    } else if (is_last) {
      add(out, sum, caches, gates, now, n);
    } else {
      add(sum, sum, caches, gates, now, n);
    }
  }
}

template <typename T>
T* part(T* row, int64_t begin) {
  return row + begin;
}
Planes part(Planes row, int64_t begin) { return {row.first + begin / 2, row.second + begin / 2}; }

}  // namespace

template <typename T, typename Out>
void residual_sum(Out out, Strided<T> x, const Term<T>* terms, int64_t count, int64_t n) {
  Buffers<T> buffers;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t length = std::min(block<T>, n - begin);
    if constexpr (std::is_same_v<Out, Float16*>) {
      sum_of_block(&buffers.last[0], x, terms, count, begin, length, buffers);
      narrow(out + begin, buffers.last, length);
    } else {
      sum_of_block(part(out, begin), x, terms, count, begin, length, buffers);
    }
  }
}

template void residual_sum(float*, Strided<float>, const Term<float>*, int64_t, int64_t);
template void residual_sum(double*, Strided<double>, const Term<double>*, int64_t, int64_t);
template void residual_sum(BFloat16*, Strided<BFloat16>, const Term<BFloat16>*, int64_t, int64_t);
template void residual_sum(Planes, Strided<BFloat16>, const Term<BFloat16>*, int64_t, int64_t);
template void residual_sum(Float16*, Strided<Float16>, const Term<Float16>*, int64_t, int64_t);
template void residual_sum(float*, Strided<Float16>, const Term<Float16>*, int64_t, int64_t);

}  // namespace harmonica
