// Compiles a function once per x86-64 level; the loader picks the best version for the machine. A wheel runs on other
// machines too, so it must not be compiled for the one that builds it.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define HARMONICA_MULTIVERSION \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), noinline))
#else  // Arm's base instruction set has vectors; other compilers and loaders get base x86-64.
#define HARMONICA_MULTIVERSION __attribute__((noinline))
#endif

#define HARMONICA_ALWAYS_INLINE inline __attribute__((always_inline))
#define HARMONICA_INLINE_LAMBDA __attribute__((always_inline))
#define HARMONICA_RESTRICT __restrict__
