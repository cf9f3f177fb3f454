// The primitives in AVX-512 (F, BW, DQ, VL), with VNNI where the form has it: one register of sixteen lanes.
// simd_portable.h says what each gives.
#pragma once

#include "simd_eight.h"

namespace freehold::FREEHOLD_FORM {

struct F32 {
  __m512 all;
};
struct I32 {
  __m512i all;
};
struct Bytes {
  __m512i all;
};

inline F32 splat(float value) { return {_mm512_set1_ps(value)}; }
inline F32 load(const float* from) { return {_mm512_loadu_ps(from)}; }
inline F32 operator+(F32 a, F32 b) { return {_mm512_add_ps(a.all, b.all)}; }
inline F32 operator-(F32 a, F32 b) { return {_mm512_sub_ps(a.all, b.all)}; }
inline F32 operator*(F32 a, F32 b) { return {_mm512_mul_ps(a.all, b.all)}; }
inline F32 operator/(F32 a, F32 b) { return {_mm512_div_ps(a.all, b.all)}; }
inline F32 fma(F32 a, F32 b, F32 c) { return {_mm512_fmadd_ps(a.all, b.all, c.all)}; }
inline F32 max(F32 a, F32 b) { return {_mm512_max_ps(a.all, b.all)}; }
inline F32 absolute(F32 a) { return {_mm512_abs_ps(a.all)}; }
inline F32 square_root(F32 a) { return {_mm512_sqrt_ps(a.all)}; }
inline F32 nearest(F32 a) { return {_mm512_roundscale_ps(a.all, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F32 where_less(F32 a, F32 b, F32 yes, F32 no) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.all, b.all, _CMP_LT_OQ), no.all, yes.all)};
}
inline bool has_nan(F32 a) { return _mm512_cmp_ps_mask(a.all, a.all, _CMP_UNORD_Q) != 0; }
inline F32 widened(I32 a) { return {_mm512_cvtepi32_ps(a.all)}; }
inline F32 widened(const std::int8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}
inline F32 widened(const std::uint8_t* from) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))))};
}

inline F32 power_of_two(F32 n) {
  const __m512i exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n.all), _mm512_set1_epi32(127));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23))};
}

inline F32 load(const std::uint16_t* bfloat16) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bfloat16));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16))};
}
inline F32 load_half(const std::uint16_t* half) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(half)))};
}

inline void store(float* to, F32 value) { _mm512_storeu_ps(to, value.all); }
// The instruction set's own conversion to bfloat16 flushes denormal numbers to zero, so it is not used.
inline void store(std::uint16_t* bfloat16, F32 value) {
  const __m512i bits = _mm512_castps_si512(value.all);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value.all, value.all, _CMP_UNORD_Q);
  const __m512i rounded = _mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(bfloat16), _mm512_cvtepi32_epi16(rounded));
}
inline void store(std::int8_t* to, F32 value) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(value.all)));
}

// Sixteen rows of sixteen elements, `stride` apart, as columns: to[16 k + n] is element k of row n.
template <typename Element>
inline void transpose(const Element* from, std::size_t stride, float* to) {
  for (int half = 0; half < 2; ++half) {
    __m256 low[8], high[8];
    for (int n = 0; n < 8; ++n) {
      const F32 row = load(from + (8 * half + n) * stride);
      low[n] = _mm512_castps512_ps256(row.all);
      high[n] = _mm512_extractf32x8_ps(row.all, 1);
    }
    transpose_eight(low, to + 8 * half);
    transpose_eight(high, to + 8 * 16 + 8 * half);
  }
}

inline float sum_of_lanes(F32 value) {
  return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(value.all), _mm512_extractf32x8_ps(value.all, 1)));
}
inline float max_of_lanes(F32 value) {
  return max_of_eight(_mm256_max_ps(_mm512_castps512_ps256(value.all), _mm512_extractf32x8_ps(value.all, 1)));
}

inline float largest_magnitude(F32 a, F32 b) {
  const __m512i most = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(a.all)), _mm512_castps_si512(_mm512_abs_ps(b.all)));
  const std::int32_t largest = _mm512_reduce_max_epi32(most);
  float value;
  std::memcpy(&value, &largest, 4);
  return value;
}

inline I32 splat_int(std::int32_t value) { return {_mm512_set1_epi32(value)}; }
inline I32 operator+(I32 a, I32 b) { return {_mm512_add_epi32(a.all, b.all)}; }

inline I32 operator-(I32 a, I32 b) { return {_mm512_sub_epi32(a.all, b.all)}; }
template <int factor>
inline I32 times_minus(I32 a) {
  if constexpr (factor == 0) return splat_int(0);
  else return splat_int(0) - I32{_mm512_slli_epi32(a.all, __builtin_ctz(factor))};
}

inline Bytes load_bytes(const std::uint8_t* from) { return {_mm512_loadu_si512(from)}; }
inline Bytes operator&(Bytes a, std::uint8_t mask) {
  return {_mm512_and_si512(a.all, _mm512_set1_epi8(static_cast<char>(mask)))};
}
inline Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.all, b.all)}; }
template <int bits>
inline Bytes shifted_left(Bytes a, std::uint8_t mask) {
  return Bytes{_mm512_slli_epi16(a.all, bits)} & mask;
}
template <int bits>
inline Bytes shifted_right(Bytes a, std::uint8_t mask) {
  return Bytes{_mm512_srli_epi16(a.all, bits)} & mask;
}
inline void store_bytes(std::uint8_t* to, Bytes value) { _mm512_storeu_si512(to, value.all); }

#if defined(FREEHOLD_VNNI)
using Sums = I32;
// The instruction takes unsigned weights: 128 more than stored, and 128 is their zero point.
constexpr int EIGHT_BIT_ZERO = 128;
inline Bytes as_eight_bits(Bytes stored) {
  return {_mm512_xor_si512(stored.all, _mm512_set1_epi8(static_cast<char>(0x80)))};
}
constexpr int quads_per_sum(int) { return 8; }
inline I32 finished(Sums sums) { return sums; }
inline Sums products(Bytes weights, std::int32_t quad) {
  return {_mm512_dpbusd_epi32(_mm512_setzero_si512(), weights.all, _mm512_set1_epi32(quad))};
}
inline void add_products(Sums& sums, Bytes weights, std::int32_t quad) {
  sums.all = _mm512_dpbusd_epi32(sums.all, weights.all, _mm512_set1_epi32(quad));
}
inline void add_products_8(I32& sums, Bytes weights, std::int32_t quad) { add_products(sums, weights, quad); }
#else
// Sums of 16 bits, as in simd_avx2.h.
struct Sums {
  __m512i all;
};
constexpr int EIGHT_BIT_ZERO = 0;
inline Bytes as_eight_bits(Bytes stored) { return stored; }
constexpr int quads_per_sum(int bits) { return bits <= 4 ? 8 : bits == 5 ? 4 : 2; }
inline I32 finished(Sums sums) { return {_mm512_madd_epi16(sums.all, _mm512_set1_epi16(1))}; }
inline Sums products(Bytes weights, std::int32_t quad) {
  return {_mm512_maddubs_epi16(weights.all, _mm512_set1_epi32(quad))};
}
inline void add_products(Sums& sums, Bytes weights, std::int32_t quad) {
  sums.all = _mm512_add_epi16(sums.all, _mm512_maddubs_epi16(weights.all, _mm512_set1_epi32(quad)));
}
// |w| times the row with w's sign: 2 * 128 * 127 = 32,512 still fits in 16 bits.
inline void add_products_8(I32& sums, Bytes weights, std::int32_t quad) {
  const __m512i row = _mm512_set1_epi32(quad);
  const __m512i signed_row = _mm512_mask_sub_epi8(row, _mm512_movepi8_mask(weights.all), _mm512_setzero_si512(), row);
  const __m512i pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(weights.all), signed_row);
  sums.all = _mm512_add_epi32(sums.all, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
#endif

// None: it is said to halve the bandwidth of a plain reading loop on Zen 4, and was not measured with these kernels.
constexpr std::size_t READ_AHEAD = 0;
inline void prefetch(const void* address) { _mm_prefetch(static_cast<const char*>(address), _MM_HINT_T0); }

}  // namespace freehold::FREEHOLD_FORM
