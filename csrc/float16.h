// Converts arrays of fp16 to fp32 and back. x86 has had instructions for this since 2012 (F16C), more than three times
// as fast as the integer code of element.h; compilers do not vectorise with them, hence intrinsics, chosen at run time.
#pragma once

#include <cstdint>

#include "element.h"
#include "multiversion.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HARMONICA_F16C 1
#endif

namespace harmonica {

HARMONICA_MULTIVERSION inline void widen_portable(float* HARMONICA_RESTRICT out, const Float16* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Element<Float16>::load(in[i]);
}

HARMONICA_MULTIVERSION inline void narrow_portable(Float16* HARMONICA_RESTRICT out, const float* in, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = Element<Float16>::store(in[i]);
}

#ifdef HARMONICA_F16C
__attribute__((target("avx,f16c"))) inline void widen_f16c(float* out, const Float16* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  for (; i < n; ++i) out[i] = Element<Float16>::load(in[i]);
}

__attribute__((target("avx,f16c"))) inline void narrow_f16c(Float16* out, const float* in, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < n; ++i) out[i] = Element<Float16>::store(in[i]);
}

inline bool has_f16c() {
  static const bool has = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");
  return has;
}

inline void widen(float* out, const Float16* in, int64_t n) {
  has_f16c() ? widen_f16c(out, in, n) : widen_portable(out, in, n);
}
inline void narrow(Float16* out, const float* in, int64_t n) {
  has_f16c() ? narrow_f16c(out, in, n) : narrow_portable(out, in, n);
}
#else
inline void widen(float* out, const Float16* in, int64_t n) { widen_portable(out, in, n); }
inline void narrow(Float16* out, const float* in, int64_t n) { narrow_portable(out, in, n); }
#endif

}  // namespace harmonica
