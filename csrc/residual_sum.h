// x + sum_k w_k * (gate_k * cache_k) over a row of numbers: the loop that the residual_reuse ops share.
//
// One multiplication by the gate, one by the weight, and one addition for each k, each rounded, in the order of k: the
// steps of the reference.
#pragma once

#include <cstdint>

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

template <typename T>
struct Term {
  Strided<T> cache;
  Strided<T> gate;  // no data: a factor of 1
};

// T is float, double, BFloat16 or Float16. Out is a pointer to T, or, where the sum is also needed unrounded,
// RoundedAndExact for BFloat16 and a pointer to float for Float16 (unrounded only). `weights` has one number per term, or
// is null: then the loop has no multiplication by them.
template <typename T, typename Out>
void residual_sum(Out out, Strided<T> x, const Term<T>* terms, const typename Element<T>::Acc* weights, int64_t count,
                  int64_t n);

}  // namespace harmonica
