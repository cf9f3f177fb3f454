// The AVX-512 form of RMSNorm (F, BW, DQ, VL): two vectors of 16 partial sums, in the order that rms_norm.h fixes.
//
// Bytes and operations as in rms_norm.cpp; for many rows it runs at the speed of memory. The tail of a row is loaded
// under a mask as zeros, which add nothing to sums that are never negative.
#include <immintrin.h>

#include "rms_norm.h"

namespace freehold {
namespace {

constexpr std::size_t VECTOR = 16;
static_assert(LANES == 2 * VECTOR);

inline __m512 load(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

inline __m512 load(const std::uint16_t* from, __mmask16 mask) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

// bfloat16_of of rms_norm.h on 16 values. The instruction set's own conversion flushes denormal numbers to zero.
inline __m256i bfloat16_of(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(sum, 16), nan, _mm512_set1_epi32(0x7FC0)));
}

inline void store(float* to, __mmask16 mask, __m512 value) { _mm512_mask_storeu_ps(to, mask, value); }
inline void store(std::uint16_t* to, __mmask16 mask, __m512 value) {
  _mm256_mask_storeu_epi16(to, mask, bfloat16_of(value));
}

inline __m512 cast(__m512 value, const float*) { return value; }
inline __m512 cast(__m512 value, const std::uint16_t*) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bfloat16_of(value)), 16));
}

constexpr __mmask16 ALL = 0xFFFF;

// The lanes of the vector at element i that lie within a row of that width.
inline __mmask16 mask_at(std::size_t i, std::size_t width) {
  if (i + VECTOR <= width) return ALL;
  return i < width ? static_cast<__mmask16>((1u << (width - i)) - 1u) : 0;
}

template <typename H>
float row_scale(const H* hidden, std::size_t width, float eps) {
  __m512 low = _mm512_setzero_ps(), high = _mm512_setzero_ps();
  const auto add_squares = [&](std::size_t i, __mmask16 low_mask, __mmask16 high_mask) {
    const __m512 first = load(hidden + i, low_mask), second = load(hidden + i + VECTOR, high_mask);
    low = _mm512_add_ps(low, _mm512_mul_ps(first, first));
    high = _mm512_add_ps(high, _mm512_mul_ps(second, second));
  };
  std::size_t i = 0;
  for (; i + LANES <= width; i += LANES) add_squares(i, ALL, ALL);
  if (i < width) add_squares(i, mask_at(i, width), mask_at(i + VECTOR, width));
  float lanes[LANES];
  _mm512_storeu_ps(lanes, low);
  _mm512_storeu_ps(lanes + VECTOR, high);
  return scale_of(lanes, width, eps);
}

template <typename H, typename W, bool cast_first>
void rows(const RmsNorm& call) {
  const W* weight = static_cast<const W*>(call.weight);
  for (std::size_t token = 0; token < call.num_tokens; ++token) {
    const H* hidden = static_cast<const H*>(call.hidden) + token * call.width;
    H* out = static_cast<H*>(call.out) + token * call.width;
    const __m512 scale = _mm512_set1_ps(row_scale(hidden, call.width, call.eps));
    const auto write = [&](std::size_t i, __mmask16 mask) {
      const __m512 unit = _mm512_mul_ps(load(hidden + i, mask), scale);
      store(out + i, mask, _mm512_mul_ps(cast_first ? cast(unit, hidden) : unit, load(weight + i, mask)));
    };
    std::size_t i = 0;
    for (; i + VECTOR <= call.width; i += VECTOR) write(i, ALL);
    if (i < call.width) write(i, mask_at(i, call.width));
  }
}

template <typename H, typename W>
void in_order(const RmsNorm& call) {
  call.cast_then_multiply ? rows<H, W, true>(call) : rows<H, W, false>(call);
}

}  // namespace

void rms_norm_avx512(const RmsNorm& call) {
  const bool wide_weight = call.weight_element == Element::float32;
  if (call.hidden_element == Element::float32)
    wide_weight ? in_order<float, float>(call) : in_order<float, std::uint16_t>(call);
  else
    wide_weight ? in_order<std::uint16_t, float>(call) : in_order<std::uint16_t, std::uint16_t>(call);
}

}  // namespace freehold
