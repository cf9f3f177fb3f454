// The primitives in plain C++, for any machine.
#pragma once

#include <cmath>

namespace freehold::FREEHOLD_FORM {

struct F32 {
  float lane[16];
};
struct I32 {
  std::int32_t lane[16];
};
// Sixty-four bytes: four in each of sixteen lanes.
struct Bytes {
  std::uint8_t byte[64];
};

#define FREEHOLD_EACH(expression)               \
  F32 out;                                      \
  for (int i = 0; i < 16; ++i) out.lane[i] = (expression); \
  return out

inline F32 splat(float value) { FREEHOLD_EACH(value); }
inline F32 load(const float* from) { FREEHOLD_EACH(from[i]); }
inline F32 operator+(F32 a, F32 b) { FREEHOLD_EACH(a.lane[i] + b.lane[i]); }
inline F32 operator-(F32 a, F32 b) { FREEHOLD_EACH(a.lane[i] - b.lane[i]); }
inline F32 operator*(F32 a, F32 b) { FREEHOLD_EACH(a.lane[i] * b.lane[i]); }
inline F32 operator/(F32 a, F32 b) { FREEHOLD_EACH(a.lane[i] / b.lane[i]); }
// a * b + c with one rounding.
inline F32 fma(F32 a, F32 b, F32 c) { FREEHOLD_EACH(std::fma(a.lane[i], b.lane[i], c.lane[i])); }
inline F32 max(F32 a, F32 b) { FREEHOLD_EACH(a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]); }
inline F32 absolute(F32 a) { FREEHOLD_EACH(std::fabs(a.lane[i])); }
inline F32 square_root(F32 a) { FREEHOLD_EACH(std::sqrt(a.lane[i])); }
inline F32 nearest(F32 a) { FREEHOLD_EACH(std::nearbyint(a.lane[i])); }
inline F32 where_less(F32 a, F32 b, F32 yes, F32 no) { FREEHOLD_EACH(a.lane[i] < b.lane[i] ? yes.lane[i] : no.lane[i]); }
inline bool has_nan(F32 a) {
  for (int i = 0; i < 16; ++i)
    if (a.lane[i] != a.lane[i]) return true;
  return false;
}
inline F32 widened(I32 a) { FREEHOLD_EACH(static_cast<float>(a.lane[i])); }
inline F32 widened(const std::int8_t* from) { FREEHOLD_EACH(static_cast<float>(from[i])); }
inline F32 widened(const std::uint8_t* from) { FREEHOLD_EACH(static_cast<float>(from[i])); }

// 2**n for whole n from -126 to 127; anything for NaN.
inline F32 power_of_two(F32 n) {
  F32 out;
  for (int i = 0; i < 16; ++i) {
    const std::int32_t whole = n.lane[i] == n.lane[i] ? static_cast<std::int32_t>(n.lane[i]) : 0;
    const std::uint32_t bits = static_cast<std::uint32_t>(whole + 127) << 23;
    std::memcpy(&out.lane[i], &bits, 4);
  }
  return out;
}

inline F32 load(const std::uint16_t* bfloat16) {
  F32 out;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16[i]) << 16;
    std::memcpy(&out.lane[i], &bits, 4);
  }
  return out;
}

// IEEE halves as float32; exact, denormal halves too.
inline F32 load_half(const std::uint16_t* half) {
  F32 out;
  for (int i = 0; i < 16; ++i) {
    const std::uint32_t sign = (half[i] & 0x8000u) << 16, exponent = (half[i] >> 10) & 31u, fraction = half[i] & 1023u;
    std::uint32_t bits = sign | ((exponent + 112u) << 23) | (fraction << 13);
    if (exponent == 31u) bits = sign | 0x7F800000u | (fraction << 13) | (fraction ? 0x400000u : 0u);
    std::memcpy(&out.lane[i], &bits, 4);
    if (exponent == 0u) out.lane[i] = (sign ? -1.0f : 1.0f) * static_cast<float>(fraction) * 0x1p-24f;
  }
  return out;
}

inline void store(float* to, F32 value) { std::memcpy(to, value.lane, sizeof value.lane); }
inline void store(std::uint16_t* bfloat16, F32 value) {
  for (int i = 0; i < 16; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, &value.lane[i], 4);
    const std::uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    bfloat16[i] = static_cast<std::uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
  }
}
// Rounded to the nearest integer, ties to even; values lie within -127 and 127.
inline void store(std::int8_t* to, F32 value) {
  for (int i = 0; i < 16; ++i) to[i] = static_cast<std::int8_t>(std::nearbyint(value.lane[i]));
}

// Sixteen rows of sixteen elements, `stride` apart, as columns: to[16 k + n] is element k of row n.
template <typename Element>
inline void transpose(const Element* from, std::size_t stride, float* to) {
  for (int n = 0; n < 16; ++n) {
    const F32 row = load(from + n * stride);
    for (int k = 0; k < 16; ++k) to[16 * k + n] = row.lane[k];
  }
}

// The lanes added as a tree of halves: i and i + 8, then i + 4, i + 2, i + 1.
inline float sum_of_lanes(F32 value) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) value.lane[i] = value.lane[i] + value.lane[i + half];
  return value.lane[0];
}
inline float max_of_lanes(F32 value) {
  float most = value.lane[0];
  for (int i = 1; i < 16; ++i) most = value.lane[i] > most ? value.lane[i] : most;
  return most;
}

// The largest magnitude of thirty-two lanes; NaN where one is (its bits, taken as an integer, are the largest).
inline float largest_magnitude(F32 a, F32 b) {
  std::uint32_t most = 0;
  for (int i = 0; i < 32; ++i) {
    std::uint32_t bits;
    std::memcpy(&bits, i < 16 ? &a.lane[i] : &b.lane[i - 16], 4);
    bits &= 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  float value;
  std::memcpy(&value, &most, 4);
  return value;
}

inline I32 splat_int(std::int32_t value) {
  I32 out;
  for (int i = 0; i < 16; ++i) out.lane[i] = value;
  return out;
}
inline I32 operator+(I32 a, I32 b) {
  for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
  return a;
}

inline I32 operator-(I32 a, I32 b) {
  for (int i = 0; i < 16; ++i) a.lane[i] -= b.lane[i];
  return a;
}
// -factor * a, for a factor that is 0 or a power of two.
template <int factor>
inline I32 times_minus(I32 a) {
  for (int i = 0; i < 16; ++i) a.lane[i] *= -factor;
  return a;
}

#undef FREEHOLD_EACH
#define FREEHOLD_EACH_BYTE(expression)            \
  Bytes out;                                      \
  for (int i = 0; i < 64; ++i) out.byte[i] = static_cast<std::uint8_t>(expression); \
  return out

inline Bytes load_bytes(const std::uint8_t* from) { FREEHOLD_EACH_BYTE(from[i]); }
inline Bytes operator&(Bytes a, std::uint8_t mask) { FREEHOLD_EACH_BYTE(a.byte[i] & mask); }
inline Bytes operator|(Bytes a, Bytes b) { FREEHOLD_EACH_BYTE(a.byte[i] | b.byte[i]); }
// The bits of each byte that `mask` keeps, after a shift; none of the kept ones comes from a neighbour.
template <int bits> inline Bytes shifted_left(Bytes a, std::uint8_t mask) { FREEHOLD_EACH_BYTE((a.byte[i] << bits) & mask); }
template <int bits> inline Bytes shifted_right(Bytes a, std::uint8_t mask) { FREEHOLD_EACH_BYTE((a.byte[i] >> bits) & mask); }
inline void store_bytes(std::uint8_t* to, Bytes value) { std::memcpy(to, value.byte, 64); }

#undef FREEHOLD_EACH_BYTE

// Integer products: `Sums` gathers, for each of sixteen lanes, products of the lane's four bytes with four int8 of a
// row (a quad). Exact in every form; `finished` gives the lane's sum.
using Sums = I32;
// Eight-bit weights meet `add_products_8` as they are stored: signed.
constexpr int EIGHT_BIT_ZERO = 0;
inline Bytes as_eight_bits(Bytes stored) { return stored; }
constexpr int quads_per_sum(int) { return 8; }  // how many quads of weights of so many bits a Sums can gather
inline I32 finished(Sums sums) { return sums; }
inline void add_products(Sums& sums, Bytes weights, std::int32_t quad) {
  std::int8_t row[4];
  std::memcpy(row, &quad, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sums.lane[i] += weights.byte[4 * i + j] * row[j];
}
inline Sums products(Bytes weights, std::int32_t quad) {
  Sums sums = splat_int(0);
  add_products(sums, weights, quad);
  return sums;
}
inline void add_products_8(I32& sums, Bytes weights, std::int32_t quad) {
  std::int8_t row[4];
  std::memcpy(row, &quad, 4);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) sums.lane[i] += static_cast<std::int8_t>(weights.byte[4 * i + j]) * row[j];
}

constexpr std::size_t READ_AHEAD = 0;
inline void prefetch(const void*) {}

}  // namespace freehold::FREEHOLD_FORM
