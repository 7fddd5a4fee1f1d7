// One row of numbers, normed and rotated: out = rotate((x - mean) * inverse * weight + bias).
//
// A row is taken apart into the first and the second numbers of its pairs, each of which lies densely in the type of
// the arithmetic. So do weight, bias, cos and sin, and all loops are over pairs.
#pragma once

#include <cstdint>
#include <type_traits>

#include "element.h"
#include "float16.h"
#include "multiversion.h"

namespace harmonica {

template <typename Acc>
struct Halves {
  const Acc *first = nullptr, *second = nullptr;
};

template <typename Acc>
struct RotaryRow {
  Halves<Acc> x, weight, bias, cos, sin;
  Acc mean = 0, inverse = 1;
};

template <bool interleaved, typename T>
HARMONICA_ALWAYS_INLINE void take_apart(typename Element<T>::Acc* HARMONICA_RESTRICT first,
                                        typename Element<T>::Acc* HARMONICA_RESTRICT second, const T* row,
                                        int64_t half) {
  for (int64_t i = 0; i < half; ++i) {
    if constexpr (interleaved && std::is_same_v<T, BFloat16>) {
      const Pair pair = load_pair(row, i);
      first[i] = pair.first;
      second[i] = pair.second;
    } else {
      first[i] = Element<T>::load(row[interleaved ? 2 * i : i]);
      second[i] = Element<T>::load(row[interleaved ? 2 * i + 1 : half + i]);
    }
  }
}

template <bool interleaved, typename T, typename Acc>
HARMONICA_ALWAYS_INLINE void turn(T* HARMONICA_RESTRICT out, const RotaryRow<Acc>& row, int64_t half) {
  const auto [x, weight, bias, cos, sin, mean, inverse] = row;
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const Acc a = (x.first[i] - mean) * inverse * weight.first[i] + bias.first[i];
    const Acc b = (x.second[i] - mean) * inverse * weight.second[i] + bias.second[i];
    const Acc turned_a = a * cos.first[i] - b * sin.first[i], turned_b = b * cos.second[i] + a * sin.second[i];
    if constexpr (interleaved && std::is_same_v<T, BFloat16>) {
      store_pair(out, i, {turned_a, turned_b});
    } else {
      out[interleaved ? 2 * i : i] = Element<T>::store(turned_a);
      out[interleaved ? 2 * i + 1 : half + i] = Element<T>::store(turned_b);
    }
  }
}

// Without a rotation all n numbers are the first of a pair.
template <typename T, typename Acc>
HARMONICA_ALWAYS_INLINE void scale(T* HARMONICA_RESTRICT out, const RotaryRow<Acc>& row, int64_t n) {
  const auto [x, weight, bias, cos, sin, mean, inverse] = row;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i)
    out[i] = Element<T>::store((x.first[i] - mean) * inverse * weight.first[i] + bias.first[i]);
}

// A multiversioned function may not be a template, hence one overload per element type.
#define HARMONICA_ROTARY(T, Acc)                                                                               \
  HARMONICA_MULTIVERSION inline void take_apart(Acc* first, Acc* second, const T* row, int64_t half,           \
                                                bool interleaved) {                                            \
    interleaved ? take_apart<true>(first, second, row, half) : take_apart<false>(first, second, row, half);    \
  }                                                                                                            \
  HARMONICA_MULTIVERSION inline void turn(T* out, const RotaryRow<Acc>& row, int64_t half, bool interleaved) { \
    interleaved ? turn<true>(out, row, half) : turn<false>(out, row, half);                                    \
  }                                                                                                            \
  HARMONICA_MULTIVERSION inline void scale_only(T* out, const RotaryRow<Acc>& row, int64_t n) { scale(out, row, n); }
HARMONICA_ROTARY(float, float)
HARMONICA_ROTARY(double, double)
HARMONICA_ROTARY(BFloat16, float)
#undef HARMONICA_ROTARY

}  // namespace harmonica
