// How an element type is loaded into the type that arithmetic is done in, and stored from it.
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
  static HARMONICA_ALWAYS_INLINE BFloat16 store(float value) {
    const uint32_t bits = bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    const bool is_nan = (bits & 0x7FFFFFFFu) > 0x7F800000u;  // rounding could carry a NaN into infinity
    return {uint16_t(is_nan ? 0x7FC0u : rounded)};
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

}  // namespace harmonica
