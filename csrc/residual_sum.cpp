// The numbers are processed in blocks, and the terms in groups. One loop reads all streams of a group; only sums of
// more terms than one group holds pass through a buffer, which stays in the first-level cache. Operands that are not
// dense in memory, and all fp16 operands (see float16.h), are first copied to buffers too.

#include "residual_sum.h"

#include <algorithm>
#include <array>
#include <type_traits>

#include "float16.h"
#include "residual_add.h"

namespace harmonica {
namespace {

// Terms per group. A pass over 8 terms has more pointers than x86 has registers, which costs less than a second pass.
// fp16 has all its streams in buffers, which the cache has to hold, so its groups are smaller.
template <typename T>
constexpr int64_t group = std::is_same_v<T, Float16> ? 4 : 8;

// Numbers per block. DiTs are 384 to 3072 wide in multiples of 384.
template <typename T>
constexpr int64_t block = std::is_same_v<T, Float16> ? 384 : 1536;

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

// The number of gates whose caches, as many for each as for the k-th, fit into one group; at most 4 with weights.
template <typename T>
int64_t together(const Terms<T>& terms, int64_t k) {
  const auto& counts = terms.weighting.counts;
  const int64_t left = terms.count - k;
  if (counts.empty()) return std::min(group<T>, left);
  const int64_t most = std::min({int64_t(4), group<T> / counts[k], left});
  int64_t now = 1;
  while (now < most && counts[k + now] == counts[k]) ++now;
  return now;
}

template <typename T, typename Out>
void sum_of_block(Out out, Strided<T> x, const Terms<T>& terms, int64_t begin, int64_t n, Buffers<T>& buffers) {
  using S = Staged<T>;
  const S* const first = stage(x.from(begin), buffers.x, n);
  const auto sum = buffers.sum_cursor(n);
  const auto& [weights, counts] = terms.weighting;
  for (int64_t done = 0, cache = 0; done < terms.count;) {
    const int64_t now = together(terms, done), per = counts.empty() ? 1 : counts[done];
    const S *caches[group<T>], *gates[group<T>];
    for (int64_t k = 0; k < now * per; ++k) caches[k] = stage(terms.caches[cache + k].from(begin), buffers.caches[k], n);
    for (int64_t k = 0; k < now; ++k) {
      const Strided<T> gate = terms.gates[done + k];
      gates[k] = gate.data ? stage(gate.from(begin), buffers.gates[k], n) : ones<T>();
    }
    const auto add_up = [&](auto to, auto from) {
      if (counts.empty()) return add(to, from, caches, gates, now, n);
      return add_weighted(to, from, caches, gates, now, weights.data() + cache, per, n);
    };
    const bool is_first = done == 0;
    done += now;
    if (is_first && done == terms.count) {
      add_up(out, first);
    } else if (is_first) {
      add_up(sum, first);
    } else if (done == terms.count) {
      add_up(out, sum);
    } else {
      add_up(sum, sum);
    }
    cache += now * per;
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
void residual_sum(Out out, Strided<T> x, const Terms<T>& terms, int64_t n) {
  Buffers<T> buffers;
  for (int64_t begin = 0; begin < n; begin += block<T>) {
    const int64_t length = std::min(block<T>, n - begin);
    if constexpr (std::is_same_v<Out, Float16*>) {
      sum_of_block(&buffers.last[0], x, terms, begin, length, buffers);
      narrow(out + begin, buffers.last, length);
    } else {
      sum_of_block(part(out, begin), x, terms, begin, length, buffers);
    }
  }
}

template void residual_sum(float*, Strided<float>, const Terms<float>&, int64_t);
template void residual_sum(double*, Strided<double>, const Terms<double>&, int64_t);
template void residual_sum(BFloat16*, Strided<BFloat16>, const Terms<BFloat16>&, int64_t);
template void residual_sum(Float16*, Strided<Float16>, const Terms<Float16>&, int64_t);
template void residual_sum(RoundedAndExact, Strided<BFloat16>, const Terms<BFloat16>&, int64_t);
template void residual_sum(float*, Strided<Float16>, const Terms<Float16>&, int64_t);

}  // namespace harmonica
