// The primitives in AVX2, FMA and F16C: two registers of eight lanes. simd_portable.h says what each gives.
#pragma once

#include "simd_eight.h"

namespace freehold::FREEHOLD_FORM {

struct F32 {
  __m256 low, high;
};
struct I32 {
  __m256i low, high;
};
struct Bytes {
  __m256i low, high;
};

inline F32 splat(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline F32 load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline F32 operator+(F32 a, F32 b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline F32 fma(F32 a, F32 b, F32 c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline F32 max(F32 a, F32 b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline F32 absolute(F32 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.low), _mm256_andnot_ps(sign, a.high)};
}
inline F32 square_root(F32 a) { return {_mm256_sqrt_ps(a.low), _mm256_sqrt_ps(a.high)}; }
inline F32 nearest(F32 a) {
  constexpr int mode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.low, mode), _mm256_round_ps(a.high, mode)};
}
inline F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm256_blendv_ps(no.low, yes.low, _mm256_cmp_ps(a.low, b.low, _CMP_LT_OQ)),
          _mm256_blendv_ps(no.high, yes.high, _mm256_cmp_ps(a.high, b.high, _CMP_LT_OQ))};
}
inline bool has_nan(F32 a) { return _mm256_movemask_ps(_mm256_cmp_ps(a.low, a.high, _CMP_UNORD_Q)) != 0; }
inline F32 widened(I32 a) { return {_mm256_cvtepi32_ps(a.low), _mm256_cvtepi32_ps(a.high)}; }
inline F32 widened(const std::int8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
inline F32 widened(const std::uint8_t* from) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)), _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8)))};
}

inline __m256 power_of_two(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
inline F32 power_of_two(F32 n) { return {power_of_two(n.low), power_of_two(n.high)}; }

inline F32 load(const std::uint16_t* bfloat16) {
  const auto half = [](const std::uint16_t* from) {
    const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
  };
  return {half(bfloat16), half(bfloat16 + 8)};
}
inline F32 load_half(const std::uint16_t* half) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(half + 8)))};
}

inline void store(float* to, F32 value) {
  _mm256_storeu_ps(to, value.low);
  _mm256_storeu_ps(to + 8, value.high);
}
inline __m256i bfloat16_bits(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7FC0), nan);
}
inline void store(std::uint16_t* bfloat16, F32 value) {
  const __m256i packed = _mm256_packus_epi32(bfloat16_bits(value.low), bfloat16_bits(value.high));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bfloat16), _mm256_permute4x64_epi64(packed, 0xD8));
}
inline void store(std::int8_t* to, F32 value) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(value.low), _mm256_cvtps_epi32(value.high));
  const __m256i ordered = _mm256_permute4x64_epi64(words, 0xD8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
}

// Sixteen rows of sixteen elements, `stride` apart, as columns: to[16 k + n] is element k of row n.
template <typename Element>
inline void transpose(const Element* from, std::size_t stride, float* to) {
  for (int half = 0; half < 2; ++half) {
    __m256 low[8], high[8];
    for (int n = 0; n < 8; ++n) {
      const F32 row = load(from + (8 * half + n) * stride);
      low[n] = row.low;
      high[n] = row.high;
    }
    transpose_eight(low, to + 8 * half);
    transpose_eight(high, to + 8 * 16 + 8 * half);
  }
}

inline float sum_of_lanes(F32 value) {
  return sum_of_eight(_mm256_add_ps(value.low, value.high));
}
inline float max_of_lanes(F32 value) {
  return max_of_eight(_mm256_max_ps(value.low, value.high));
}

inline __m256i magnitude_bits(__m256 value) {
  return _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7FFFFFFF));
}
inline float largest_of(__m256i bits) {
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4E));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xB1))));
}
inline float largest_magnitude(F32 a, F32 b) {
  return largest_of(_mm256_max_epi32(_mm256_max_epi32(magnitude_bits(a.low), magnitude_bits(a.high)),
                                     _mm256_max_epi32(magnitude_bits(b.low), magnitude_bits(b.high))));
}

inline I32 splat_int(std::int32_t value) { return {_mm256_set1_epi32(value), _mm256_set1_epi32(value)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }

inline I32 operator-(I32 a, I32 b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
template <int factor>
inline I32 times_minus(I32 a) {
  if constexpr (factor == 0) return splat_int(0);
  else return splat_int(0) - I32{_mm256_slli_epi32(a.low, __builtin_ctz(factor)), _mm256_slli_epi32(a.high, __builtin_ctz(factor))};
}

inline Bytes load_bytes(const std::uint8_t* from) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 32))};
}
inline Bytes operator&(Bytes a, std::uint8_t mask) {
  const __m256i kept = _mm256_set1_epi8(static_cast<char>(mask));
  return {_mm256_and_si256(a.low, kept), _mm256_and_si256(a.high, kept)};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
template <int bits>
inline Bytes shifted_left(Bytes a, std::uint8_t mask) {
  return Bytes{_mm256_slli_epi16(a.low, bits), _mm256_slli_epi16(a.high, bits)} & mask;
}
template <int bits>
inline Bytes shifted_right(Bytes a, std::uint8_t mask) {
  return Bytes{_mm256_srli_epi16(a.low, bits), _mm256_srli_epi16(a.high, bits)} & mask;
}
inline void store_bytes(std::uint8_t* to, Bytes value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value.low);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), value.high);
}

// Sums of 16 bits: two products of weights below 2**bits and rows within 127 fit in them, and so do these many quads:
// 8 * 2 * 15 * 127 = 30,480; 4 * 2 * 31 * 127 = 31,496; 2 * 2 * 63 * 127 = 32,004; all below 32,768.
struct Sums {
  __m256i low, high;
};
// Eight-bit weights meet `add_products_8` as they are stored: signed.
constexpr int EIGHT_BIT_ZERO = 0;
inline Bytes as_eight_bits(Bytes stored) { return stored; }
constexpr int quads_per_sum(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : 2; }
inline I32 finished(Sums sums) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {_mm256_madd_epi16(sums.low, ones), _mm256_madd_epi16(sums.high, ones)};
}
inline Sums products(Bytes weights, std::int32_t quad) {
  const __m256i row = _mm256_set1_epi32(quad);
  return {_mm256_maddubs_epi16(weights.low, row), _mm256_maddubs_epi16(weights.high, row)};
}
inline void add_products(Sums& sums, Bytes weights, std::int32_t quad) {
  const __m256i row = _mm256_set1_epi32(quad);
  sums.low = _mm256_add_epi16(sums.low, _mm256_maddubs_epi16(weights.low, row));
  sums.high = _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(weights.high, row));
  asm("" : "+x"(sums.low), "+x"(sums.high));  // the compiler would move all products before all sums, and spill them
}
// |w| times the row with w's sign: 2 * 128 * 127 = 32,512 still fits in 16 bits.
inline void add_products_8(I32& sums, Bytes weights, std::int32_t quad) {
  const __m256i row = _mm256_set1_epi32(quad), ones = _mm256_set1_epi16(1);
  const auto products = [&](__m256i w) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(row, w)), ones);
  };
  sums.low = _mm256_add_epi32(sums.low, products(weights.low));
  sums.high = _mm256_add_epi32(sums.high, products(weights.high));
}

// Bytes; measured on Zen 3, where it is worth 10 to 20 % of the memory bandwidth.
constexpr std::size_t READ_AHEAD = 2048;
inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

}  // namespace freehold::FREEHOLD_FORM
