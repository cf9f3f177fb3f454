// Sixteen lanes, whatever the machine: every kernel is written once against this file and compiled once per form.
//
// A form is a set of instructions (portable, avx2, avx512, avx512vnni). The build compiles each kernel file for each
// form with that form's flags and defines FREEHOLD_FORM, the namespace everything lives in, so no two forms share a
// symbol. Lanes are always sixteen: two registers in AVX2, one in AVX-512. Products and sums are fused where `fma` says
// so and nowhere else (the build forbids contraction), so every form gives the same bits.
//
// Here: the functions that are made of others. The primitives are in the form's own file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include "simd_avx512.h"
#elif defined(__AVX2__)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace freehold::FREEHOLD_FORM {

constexpr int LANES = 16;

// Asks for bytes of a stream that is read from front to back, READ_AHEAD before they are wanted; it may end before.
template <std::size_t num_bytes>
inline void read_ahead([[maybe_unused]] const void* from) {
  if constexpr (READ_AHEAD > 0)
    for (std::size_t i = 0; i < num_bytes; i += 64)
      prefetch(reinterpret_cast<const void*>(reinterpret_cast<std::uintptr_t>(from) + READ_AHEAD + i));
}

inline F32& operator+=(F32& a, F32 b) { return a = a + b; }

// e**x to 1 or 2 units in the last place; 0 below -87.3 (and for -inf), infinity above 88.3, NaN for NaN.
// Method: x = n ln 2 + r with |r| <= ln 2 / 2 (Cody and Waite's two-part ln 2), a polynomial of degree 6 in r.
inline F32 exp(F32 x) {
  const F32 low = splat(-87.33654f), high = splat(88.37626f);  // n stays within -126 and 127
  F32 within = where_less(x, low, low, x);
  within = where_less(high, within, high, within);
  const F32 n = nearest(within * splat(1.44269504f));
  F32 r = fma(n, splat(-0.693359375f), within);
  r = fma(n, splat(2.12194440e-4f), r);
  F32 p = splat(1.98756915e-4f);
  p = fma(p, r, splat(1.39819995e-3f));
  p = fma(p, r, splat(8.33345205e-3f));
  p = fma(p, r, splat(4.16657962e-2f));
  p = fma(p, r, splat(1.66666657e-1f));
  p = fma(p, r, splat(5.0e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  const F32 result = where_less(x, low, splat(0.0f), p * power_of_two(n));
  return where_less(high, x, splat(__builtin_inff()), result);
}

inline F32 sigmoid(F32 x) { return splat(1.0f) / (splat(1.0f) + exp(splat(0.0f) - x)); }
inline F32 silu(F32 x) { return x / (splat(1.0f) + exp(splat(0.0f) - x)); }

// A kernel's elements: float32, or the upper half of one (bfloat16) as std::uint16_t.
inline float wide(float value) { return value; }
inline float wide(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest, ties to even; every NaN becomes the one that torch writes.
inline std::uint16_t bfloat16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// The first n (0 to 16) elements, zeros behind them.
template <typename Element>
inline F32 load_first(const Element* from, std::size_t n) {
  if (n == LANES) return load(from);  // nearly always
  Element lanes[LANES] = {};
  std::memcpy(lanes, from, n * sizeof(Element));
  return load(lanes);
}

template <typename Element>
inline void store_first(Element* to, F32 value, std::size_t n) {
  if (n == LANES) return store(to, value);
  Element lanes[LANES];
  store(lanes, value);
  std::memcpy(to, lanes, n * sizeof(Element));
}

}  // namespace freehold::FREEHOLD_FORM
