// x + sum_k gate_k * y_k over a row of numbers: the loop that the residual_reuse ops share. y_k is a cache, or a weighted
// sum of some.
//
// Each multiplication and each addition is rounded, in the order of k: the steps of the reference.
#pragma once

#include <cstdint>

#include "arguments.h"
#include "element.h"

namespace harmonica {

// Numbers of type T that lie `stride` bytes apart; a stride of 0 repeats one number.
template <typename T>
struct Strided {
  const char* data = nullptr;
  int64_t stride = 0;

  const T& operator[](int64_t i) const { return *reinterpret_cast<const T*>(data + i * stride); }
  Strided from(int64_t begin) const { return {data + begin * stride, stride}; }
  bool is_dense() const { return stride == int64_t(sizeof(T)); }
};

// The weight of each cache, and the number of caches of each y; both empty where every y is a cache without a weight.
template <typename T>
struct Weighting {
  c10::SmallVector<typename Element<T>::Acc, 16> weights;
  c10::SmallVector<int64_t, 16> counts;

  explicit Weighting(const Summands& terms) {
    if (terms.is_plain()) return;
    weights = weights_at<typename Element<T>::Acc>(terms.weights, terms.places, terms.caches.size());
    counts.assign(terms.gates.size(), 1);
    if (!terms.counts.empty()) counts.assign(terms.counts.begin(), terms.counts.end());
  }
};

// What is added to a row of x.
template <typename T>
struct Terms {
  const Strided<T>*caches, *gates;  // a gate without data: a factor of 1
  int64_t count;                    // of gates
  const Weighting<T>& weighting;
};

// T is float, double, BFloat16 or Float16. Out is a pointer to T, or, where the sum is also needed unrounded,
// RoundedAndExact for BFloat16 and a pointer to float for Float16 (unrounded only).
template <typename T, typename Out>
void residual_sum(Out out, Strided<T> x, const Terms<T>& terms, int64_t n);

}  // namespace harmonica
