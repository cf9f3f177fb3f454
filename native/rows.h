// Rows of activations made ready for products: normed, as floats, and quantized in groups of thirty-two.
#pragma once

#include "elements.h"
#include "matrix.h"
#include "residual.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {

// Below this 127 over the largest magnitude is no float32 any more, and a group counts as zeros.
constexpr float SMALLEST_MAGNITUDE = 4e-37f;

// Two vectors as one RowGroup. The scale is the largest magnitude / 127; values are rounded to nearest, ties to even.
// Where one is NaN or infinite the scale is NaN, and so is every product of the group.
inline void quantize_group(F32 first, F32 second, RowGroup* to) {
  const float largest = largest_magnitude(first, second);
  const bool is_finite = largest <= __FLT_MAX__;
  if (!is_finite || largest < SMALLEST_MAGNITUDE) {
    *to = {{}, is_finite ? 0.0f : __builtin_nanf(""), 0, 0};
    return;
  }
  const F32 inverse = splat(127.0f / largest);
  store(to->values, first * inverse);
  store(to->values + LANES, second * inverse);
  to->scale = largest / 127.0f;
  std::int32_t first_half = 0, second_half = 0;
  for (int i = 0; i < LANES; ++i) first_half += to->values[i], second_half += to->values[LANES + i];
  to->sum = first_half + second_half;
  to->first_half = first_half;
}

// Columns that are no whole number of groups never meet quantized weights, so only whole groups are quantized.
inline void quantize_row(const float* row, std::size_t width, RowGroup* to) {
  for (std::size_t g = 0; g < width / GROUP; ++g)
    quantize_group(load(row + g * GROUP), load(row + g * GROUP + LANES), to + g);
}

// RMSNorm of one row.
void normalize_row(const void* hidden, Element hidden_element, std::size_t width, const Norm& norm, float* out);

}  // namespace freehold::FREEHOLD_FORM
