// Loads elements into the type that arithmetic is done in, and stores them from it.
//
// The conversions are branch-free integer code, because that is what compilers vectorise: a call or a branch in them
// would make the whole loop scalar. Rounding is to nearest, ties to even, as in PyTorch.
#pragma once

#include <cstdint>
#include <cstring>

#include "multiversion.h"

namespace harmonica {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename To, typename From>
HARMONICA_ALWAYS_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename T>
struct Element {  // float, double
  using Acc = T;
  static constexpr T one = 1;
  static HARMONICA_ALWAYS_INLINE Acc load(T value) { return value; }
  static HARMONICA_ALWAYS_INLINE T store(Acc value) { return value; }
};

template <>
struct Element<BFloat16> {
  using Acc = float;
  static constexpr BFloat16 one{0x3F80};
  static HARMONICA_ALWAYS_INLINE float load(BFloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
  static HARMONICA_ALWAYS_INLINE BFloat16 store(float value) { return {uint16_t(rounded(value) >> 16)}; }

  // The bf16 number in the upper 16 bits; the lower 16 are left over from rounding.
  static HARMONICA_ALWAYS_INLINE uint32_t rounded(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    // Rounding could carry a NaN into infinity.
    return value != value ? 0x7FC00000u : bits + 0x7FFFu + ((bits >> 16) & 1u);
  }
};

template <>
struct Element<Float16> {
  using Acc = float;
  static constexpr Float16 one{0x3C00};

  static HARMONICA_ALWAYS_INLINE float load(Float16 value) {
    const uint32_t sign = uint32_t(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7FFFu;
    // Moved to fp32's exponent field and multiplied by 2^112, which rebiases normal and subnormal numbers alike.
    const float rebiased = bit_cast<float>(magnitude << 13) * bit_cast<float>(uint32_t(127 + 112) << 23);
    const uint32_t not_finite = 0x7F800000u | (magnitude << 13);
    const uint32_t bits = magnitude >= 0x7C00u ? not_finite : bit_cast<uint32_t>(rebiased);
    return bit_cast<float>(sign | bits);
  }

  static HARMONICA_ALWAYS_INLINE Float16 store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    // Normal range: round off 13 bits of the significand, then rebias the exponent by -112.
    const uint32_t normal = (magnitude + 0xFFFu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    // Below 2^-14: adding 0.5 puts the last bit of a subnormal half at the last bit of fp32, so that the addition rounds.
    const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    uint32_t half = magnitude < (113u << 23) ? subnormal : normal;
    half = magnitude >= 0x477FF000u ? 0x7C00u : half;  // 65520 and above round to infinity
    half = magnitude > 0x7F800000u ? 0x7E00u : half;
    return {uint16_t(sign | half)};
  }
};

// Two neighbours at a time. For bf16 that is a 32-bit word, which takes a shift for the first and a mask for the second
// and no move across lanes: loops over pairs are 1.5 times as fast. (This assumes a little-endian machine.)
struct Pair {
  float first, second;
};

HARMONICA_ALWAYS_INLINE Pair load_pair(const BFloat16* row, int64_t pair) {
  uint32_t word;
  std::memcpy(&word, row + 2 * pair, sizeof(word));
  return {bit_cast<float>(word << 16), bit_cast<float>(word & 0xFFFF0000u)};
}
HARMONICA_ALWAYS_INLINE float load_first(const BFloat16* row, int64_t pair) {
  return Element<BFloat16>::load(row[2 * pair]);
}
HARMONICA_ALWAYS_INLINE void store_pair(BFloat16* row, int64_t pair, Pair values) {
  using E = Element<BFloat16>;
  const uint32_t word = (E::rounded(values.first) >> 16) | (E::rounded(values.second) & 0xFFFF0000u);
  std::memcpy(row + 2 * pair, &word, sizeof(word));
}
HARMONICA_ALWAYS_INLINE void store_first(BFloat16* row, int64_t pair, float value) {
  row[2 * pair] = Element<BFloat16>::store(value);
}

// A row of bf16 widened to fp32, in two planes: the first numbers of all pairs, then the second numbers of all pairs.
// The last number of a row of odd length is the first of a pair without a second.
struct Planes {
  float *first, *second;
};
inline Planes planes(float* row, int64_t n) { return {row, row + (n + 1) / 2}; }
HARMONICA_ALWAYS_INLINE Pair load_pair(Planes row, int64_t pair) { return {row.first[pair], row.second[pair]}; }
HARMONICA_ALWAYS_INLINE float load_first(Planes row, int64_t pair) { return row.first[pair]; }
HARMONICA_ALWAYS_INLINE void store_pair(Planes row, int64_t pair, Pair values) {
  row.first[pair] = values.first;
  row.second[pair] = values.second;
}
HARMONICA_ALWAYS_INLINE void store_first(Planes row, int64_t pair, float value) { row.first[pair] = value; }

// A row that is stored twice: rounded to bf16, and unrounded in fp32.
struct RoundedAndExact {
  BFloat16* rounded;
  Planes exact;
};
HARMONICA_ALWAYS_INLINE void store_pair(RoundedAndExact row, int64_t pair, Pair values) {
  store_pair(row.rounded, pair, values);
  store_pair(row.exact, pair, values);
}
HARMONICA_ALWAYS_INLINE void store_first(RoundedAndExact row, int64_t pair, float value) {
  store_first(row.rounded, pair, value);
  store_first(row.exact, pair, value);
}

}  // namespace harmonica
