// What every CPU kernel needs: vector clones of a function, and 16-bit floats.
#pragma once

#include <cstdint>

// One clone of the function per instruction set, picked when the library loads. A helper that is not always_inline keeps the
// baseline instruction set and is called, not inlined: 5 to 10 times slower.
// The levels x86-64-v3 and -v4 test for features; names such as arch=haswell test for the maker, and miss every AMD processor.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define DIT_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DIT_MULTIVERSION __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define DIT_MULTIVERSION
#endif
#define DIT_INLINE inline __attribute__((always_inline))

namespace dit {

struct bfloat16 {
  uint16_t bits;
};

DIT_INLINE float widen(float value) { return value; }

DIT_INLINE float widen(bfloat16 value) { return __builtin_bit_cast(float, static_cast<uint32_t>(value.bits) << 16); }

DIT_INLINE void narrow(float value, float& out) { out = value; }

// Rounds to nearest even; a NaN stays a NaN.
DIT_INLINE void narrow(float value, bfloat16& out) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  out.bits = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

}  // namespace dit
