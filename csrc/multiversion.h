// One function, one machine-code version per x86-64 level, the best one chosen by the loader. A wheel travels, so it
// may not be compiled for the machine that built it.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HARMONICA_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else  // Arm has its vectors in the base; other compilers and loaders get the base of x86-64.
#define HARMONICA_MULTIVERSION __attribute__((noinline))
#endif

#define HARMONICA_ALWAYS_INLINE inline __attribute__((always_inline))
#define HARMONICA_INLINE_LAMBDA __attribute__((always_inline))
#define HARMONICA_RESTRICT __restrict__
