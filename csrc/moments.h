// Mean and inverse deviation of a row of numbers, for LayerNorm, or its inverse root mean square, for RMSNorm.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "multiversion.h"

namespace harmonica {

template <typename Acc>
struct Sums {
  Acc plain = 0, squares = 0;
};

// Sums of row[i] - centre and of its square, in 32 lanes on every machine, so that no lane adds up many numbers.
template <typename Acc>
HARMONICA_ALWAYS_INLINE Sums<Acc> sums_around(Acc centre, const Acc* row, int64_t n) {
  typedef Acc Vector __attribute__((vector_size(32)));
  constexpr int64_t width = sizeof(Vector) / sizeof(Acc), vectors = 32 / width;
  Vector plain[vectors] = {}, squares[vectors] = {};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int64_t v = 0; v < vectors; ++v) {
      Vector values;
      std::memcpy(&values, row + i + v * width, sizeof(values));
      values -= centre;
      plain[v] += values;
      squares[v] += values * values;
    }
  for (; i < n; i += width) {
    Vector values = Vector{} + centre;  // lanes beyond the row add nothing
    std::memcpy(&values, row + i, std::min(width, n - i) * sizeof(Acc));
    values -= centre;
    plain[0] += values;
    squares[0] += values * values;
  }
  for (int64_t v = 1; v < vectors; ++v) {
    plain[0] += plain[v];
    squares[0] += squares[v];
  }
  Sums<Acc> sums;
  for (int64_t lane = 0; lane < width; ++lane) {
    sums.plain += plain[0][lane];
    sums.squares += squares[0][lane];
  }
  return sums;
}

template <typename Acc>
struct Moments {
  Acc mean, inverse_deviation;
};

// One pass is enough where the mean is smaller than the standard deviation: the mean square minus the square of the
// mean then loses one bit at most. Elsewhere a second pass sums around the mean of the first, and also finds the error
// of that mean.
template <typename Acc>
HARMONICA_ALWAYS_INLINE Moments<Acc> moments_of(const Acc* row, int64_t n, bool rms, double eps) {
  Sums<Acc> sums = sums_around(Acc(0), row, n);
  Acc mean = rms ? Acc(0) : sums.plain / Acc(n);
  Acc variance = sums.squares / Acc(n) - mean * mean;
  const bool is_enough = rms || (mean * mean < variance && std::isfinite(variance));
  if (!is_enough) {
    sums = sums_around(mean, row, n);
    const Acc missed = sums.plain / Acc(n);
    mean += missed;
    variance = sums.squares / Acc(n) - missed * missed;
  }
  return {mean, Acc(1 / std::sqrt(double(variance) + eps))};
}

// A multiversioned function may not be a template, hence one overload per type.
#define HARMONICA_MOMENTS(T)                                                                           \
  HARMONICA_MULTIVERSION inline Moments<T> moments(const T* row, int64_t n, bool rms, double eps) {    \
    return moments_of(row, n, rms, eps);                                                               \
  }
HARMONICA_MOMENTS(float)
HARMONICA_MOMENTS(double)
#undef HARMONICA_MOMENTS

}  // namespace harmonica
