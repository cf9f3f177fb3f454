// The AVX-512 intrinsics that native/simd_avx512.h uses, made of AVX2 and plain C++, so that the AVX-512 forms run on
// any x86 machine with AVX2. Included before everything else (g++ -include); what is missing here does not compile.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated {

// The same bits, seen as another type: __m512 as two __m256, or as lanes.
template <typename To, typename From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}
template <typename Lane>
struct Lanes {
  Lane at[64 / sizeof(Lane)];
};
struct FloatHalves {
  __m256 low, high;
};
struct IntHalves {
  __m256i low, high;
};

template <typename Function>
inline __m512 by_halves(__m512 a, Function&& f) {
  const FloatHalves x = as<FloatHalves>(a);
  return as<__m512>(FloatHalves{f(x.low), f(x.high)});
}
template <typename Function>
inline __m512 by_halves(__m512 a, __m512 b, Function&& f) {
  const FloatHalves x = as<FloatHalves>(a), y = as<FloatHalves>(b);
  return as<__m512>(FloatHalves{f(x.low, y.low), f(x.high, y.high)});
}
template <typename Function>
inline __m512i by_halves(__m512i a, Function&& f) {
  const IntHalves x = as<IntHalves>(a);
  return as<__m512i>(IntHalves{f(x.low), f(x.high)});
}
template <typename Function>
inline __m512i by_halves(__m512i a, __m512i b, Function&& f) {
  const IntHalves x = as<IntHalves>(a), y = as<IntHalves>(b);
  return as<__m512i>(IntHalves{f(x.low, y.low), f(x.high, y.high)});
}
template <typename To, typename Lane, typename Function>
inline To by_lanes(Function&& f) {
  Lanes<Lane> out;
  for (unsigned i = 0; i < sizeof out / sizeof(Lane); ++i) out.at[i] = f(i);
  return as<To>(out);
}

#define EMULATED_TWO(type, name, wide, narrow) \
  inline type name(type a, type b) {           \
    return by_halves(a, b, [](wide x, wide y) { return narrow(x, y); }); \
  }
EMULATED_TWO(__m512, add_ps, __m256, _mm256_add_ps)
EMULATED_TWO(__m512, sub_ps, __m256, _mm256_sub_ps)
EMULATED_TWO(__m512, mul_ps, __m256, _mm256_mul_ps)
EMULATED_TWO(__m512, div_ps, __m256, _mm256_div_ps)
EMULATED_TWO(__m512, max_ps, __m256, _mm256_max_ps)
EMULATED_TWO(__m512i, add_epi16, __m256i, _mm256_add_epi16)
EMULATED_TWO(__m512i, add_epi32, __m256i, _mm256_add_epi32)
EMULATED_TWO(__m512i, sub_epi32, __m256i, _mm256_sub_epi32)
EMULATED_TWO(__m512i, max_epi32, __m256i, _mm256_max_epi32)
EMULATED_TWO(__m512i, and_si512, __m256i, _mm256_and_si256)
EMULATED_TWO(__m512i, or_si512, __m256i, _mm256_or_si256)
EMULATED_TWO(__m512i, xor_si512, __m256i, _mm256_xor_si256)
EMULATED_TWO(__m512i, madd_epi16, __m256i, _mm256_madd_epi16)
EMULATED_TWO(__m512i, maddubs_epi16, __m256i, _mm256_maddubs_epi16)
#undef EMULATED_TWO

inline __m512 sqrt_ps(__m512 a) {
  return by_halves(a, [](__m256 x) { return _mm256_sqrt_ps(x); });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const FloatHalves x = as<FloatHalves>(a), y = as<FloatHalves>(b), z = as<FloatHalves>(c);
  return as<__m512>(FloatHalves{_mm256_fmadd_ps(x.low, y.low, z.low), _mm256_fmadd_ps(x.high, y.high, z.high)});
}
template <int mode>
inline __m512 roundscale_ps(__m512 a) {
  static_assert(mode == (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), "only rounding to whole numbers is here");
  return by_halves(a, [](__m256 x) { return _mm256_round_ps(x, mode); });
}
inline __m512i abs_epi8(__m512i a) {
  return by_halves(a, [](__m256i x) { return _mm256_abs_epi8(x); });
}
template <int bits>
inline __m512i slli_epi16(__m512i a) {
  return by_halves(a, [](__m256i x) { return _mm256_slli_epi16(x, bits); });
}
template <int bits>
inline __m512i srli_epi16(__m512i a) {
  return by_halves(a, [](__m256i x) { return _mm256_srli_epi16(x, bits); });
}
template <int bits>
inline __m512i slli_epi32(__m512i a) {
  return by_halves(a, [](__m256i x) { return _mm256_slli_epi32(x, bits); });
}
template <int bits>
inline __m512i srli_epi32(__m512i a) {
  return by_halves(a, [](__m256i x) { return _mm256_srli_epi32(x, bits); });
}

inline __m512i castps_si512(__m512 a) { return as<__m512i>(a); }
inline __m512 castsi512_ps(__m512i a) { return as<__m512>(a); }
inline __m256 castps512_ps256(__m512 a) { return as<FloatHalves>(a).low; }
inline __m256 extractf32x8_ps(__m512 a, int half) { return half ? as<FloatHalves>(a).high : as<FloatHalves>(a).low; }
inline __m512 abs_ps(__m512 a) {
  return by_lanes<__m512, std::uint32_t>([&](int i) { return as<Lanes<std::uint32_t>>(a).at[i] & 0x7FFFFFFFu; });
}

inline __m512 set1_ps(float x) { return as<__m512>(FloatHalves{_mm256_set1_ps(x), _mm256_set1_ps(x)}); }
inline __m512i set1_epi8(char x) { return as<__m512i>(IntHalves{_mm256_set1_epi8(x), _mm256_set1_epi8(x)}); }
inline __m512i set1_epi16(short x) { return as<__m512i>(IntHalves{_mm256_set1_epi16(x), _mm256_set1_epi16(x)}); }
inline __m512i set1_epi32(int x) { return as<__m512i>(IntHalves{_mm256_set1_epi32(x), _mm256_set1_epi32(x)}); }
inline __m512i setzero_si512() { return set1_epi32(0); }

inline __m512 loadu_ps(const void* from) {
  __m512 to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline __m512i loadu_si512(const void* from) {
  __m512i to;
  std::memcpy(&to, from, sizeof to);
  return to;
}
inline void storeu_ps(void* to, __m512 a) { std::memcpy(to, &a, sizeof a); }
inline void storeu_si512(void* to, __m512i a) { std::memcpy(to, &a, sizeof a); }

inline __m512 cvtepi32_ps(__m512i a) {
  const IntHalves x = as<IntHalves>(a);
  return as<__m512>(FloatHalves{_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)});
}
inline __m512i cvtps_epi32(__m512 a) {
  const FloatHalves x = as<FloatHalves>(a);
  return as<__m512i>(IntHalves{_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)});
}
inline __m512 cvtph_ps(__m256i a) {
  return as<__m512>(
      FloatHalves{_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))});
}
inline __m512i cvtepu16_epi32(__m256i a) {
  return as<__m512i>(
      IntHalves{_mm256_cvtepu16_epi32(_mm256_castsi256_si128(a)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(a, 1))});
}
inline __m512i cvtepi8_epi32(__m128i a) {
  return as<__m512i>(IntHalves{_mm256_cvtepi8_epi32(a), _mm256_cvtepi8_epi32(_mm_srli_si128(a, 8))});
}
inline __m512i cvtepu8_epi32(__m128i a) {
  return as<__m512i>(IntHalves{_mm256_cvtepu8_epi32(a), _mm256_cvtepu8_epi32(_mm_srli_si128(a, 8))});
}
inline __m256i cvtepi32_epi16(__m512i a) {  // the low halves, not saturated
  std::uint16_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = static_cast<std::uint16_t>(as<Lanes<std::uint32_t>>(a).at[i]);
  return as<__m256i>(out);
}
inline __m128i cvtepi32_epi8(__m512i a) {
  std::uint8_t out[16];
  for (int i = 0; i < 16; ++i) out[i] = static_cast<std::uint8_t>(as<Lanes<std::uint32_t>>(a).at[i]);
  return as<__m128i>(out);
}

inline __mmask16 cmp_ps_mask(__m512 a, __m512 b, int what) {
  const Lanes<float> x = as<Lanes<float>>(a), y = as<Lanes<float>>(b);
  if (what != _CMP_LT_OQ && what != _CMP_UNORD_Q) __builtin_trap();
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) {
    const bool is_unordered = x.at[i] != x.at[i] || y.at[i] != y.at[i];
    mask |= static_cast<unsigned>(what == _CMP_LT_OQ ? x.at[i] < y.at[i] : is_unordered) << i;
  }
  return static_cast<__mmask16>(mask);
}
inline __m512 mask_blend_ps(__mmask16 k, __m512 no, __m512 yes) {
  return by_lanes<__m512, float>([&](int i) { return as<Lanes<float>>(k >> i & 1 ? yes : no).at[i]; });
}
inline __m512i mask_mov_epi32(__m512i no, __mmask16 k, __m512i yes) {
  return by_lanes<__m512i, int>([&](int i) { return as<Lanes<int>>(k >> i & 1 ? yes : no).at[i]; });
}
inline __mmask64 movepi8_mask(__m512i a) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>(as<Lanes<std::uint8_t>>(a).at[i] >> 7) << i;
  return mask;
}
inline __m512i mask_sub_epi8(__m512i no, __mmask64 k, __m512i a, __m512i b) {
  using Bytes = Lanes<std::uint8_t>;
  return by_lanes<__m512i, std::uint8_t>([&](int i) {
    const int difference = as<Bytes>(a).at[i] - as<Bytes>(b).at[i];
    return static_cast<std::uint8_t>(k >> i & 1 ? difference : as<Bytes>(no).at[i]);
  });
}
inline int reduce_max_epi32(__m512i a) {
  const Lanes<int> x = as<Lanes<int>>(a);
  int most = x.at[0];
  for (int lane : x.at) most = lane > most ? lane : most;
  return most;
}
// Four products of an unsigned and a signed byte, all exact, and their sum on top of a 32-bit one.
inline __m512i dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  return by_lanes<__m512i, int>([&](int i) {
    int sum = as<Lanes<int>>(sums).at[i];
    for (int j = 4 * i; j < 4 * i + 4; ++j)
      sum += as<Lanes<std::uint8_t>>(a).at[j] * as<Lanes<std::int8_t>>(b).at[j];
    return sum;
  });
}

}  // namespace emulated

#undef _mm512_roundscale_ps
#undef _mm512_slli_epi16
#undef _mm512_srli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srli_epi32
#undef _mm512_cmp_ps_mask
#undef _mm512_extractf32x8_ps
#define _mm512_roundscale_ps(a, mode) emulated::roundscale_ps<mode>(a)
#define _mm512_slli_epi16(a, bits) emulated::slli_epi16<bits>(a)
#define _mm512_srli_epi16(a, bits) emulated::srli_epi16<bits>(a)
#define _mm512_slli_epi32(a, bits) emulated::slli_epi32<bits>(a)
#define _mm512_srli_epi32(a, bits) emulated::srli_epi32<bits>(a)
#define _mm512_cmp_ps_mask emulated::cmp_ps_mask
#define _mm512_extractf32x8_ps emulated::extractf32x8_ps
#define _mm512_add_ps emulated::add_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_div_ps emulated::div_ps
#define _mm512_max_ps emulated::max_ps
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_sub_epi32 emulated::sub_epi32
#define _mm512_max_epi32 emulated::max_epi32
#define _mm512_and_si512 emulated::and_si512
#define _mm512_or_si512 emulated::or_si512
#define _mm512_xor_si512 emulated::xor_si512
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_sqrt_ps emulated::sqrt_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_abs_epi8 emulated::abs_epi8
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castps512_ps256 emulated::castps512_ps256
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_setzero_si512 emulated::setzero_si512
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_storeu_si512 emulated::storeu_si512
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_mask_blend_ps emulated::mask_blend_ps
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_movepi8_mask emulated::movepi8_mask
#define _mm512_mask_sub_epi8 emulated::mask_sub_epi8
#define _mm512_reduce_max_epi32 emulated::reduce_max_epi32
#define _mm512_dpbusd_epi32 emulated::dpbusd_epi32

#define __AVX512F__ 1
