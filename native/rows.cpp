// RMSNorm of each row.
//
// The sum of squares is kept in two vectors of partial sums: element i goes to lane i % 32, in order of i, and the lanes
// are then added in a fixed tree of halves; a row never sees another row.
//
// Bytes per row: reads hidden once from memory and once from cache, reads the weight (in cache after the first row),
// writes out. Operations: 4 per element. Bound by memory for many rows, by the latency of a few sums for one.
#include "rows.h"

namespace freehold::FREEHOLD_FORM {
namespace {

template <typename Element>
float sum_of_squares(const Element* hidden, std::size_t width) {
  F32 low = splat(0.0f), high = splat(0.0f);
  std::size_t i = 0;
  for (; i + 2 * LANES <= width; i += 2 * LANES) {
    const F32 first = load(hidden + i), second = load(hidden + i + LANES);
    low += first * first;
    high += second * second;
  }
  const std::size_t left = width - i, first_left = left < LANES ? left : LANES;
  const F32 first = load_first(hidden + i, first_left), second = load_first(hidden + i + first_left, left - first_left);
  low += first * first;
  high += second * second;
  return sum_of_lanes(low + high);
}

inline F32 rounded_to(F32 value, const float*) { return value; }
inline F32 rounded_to(F32 value, const std::uint16_t*) {
  std::uint16_t rounded[LANES];
  store(rounded, value);
  return load(rounded);
}

template <typename Hidden, typename Weight>
void normalize(const Hidden* hidden, std::size_t width, const Norm& norm, float* out) {
  const Weight* weight = static_cast<const Weight*>(norm.weight);
  const F32 mean = splat(sum_of_squares(hidden, width) / static_cast<float>(width) + norm.eps);
  const F32 scale = splat(1.0f) / square_root(mean);
  const auto value = [&](F32 wide_hidden, F32 wide_weight) {
    F32 unit = wide_hidden * scale;
    if (norm.cast_then_multiply) unit = rounded_to(unit, hidden);
    return rounded_to(unit * wide_weight, hidden);
  };
  std::size_t i = 0;
  for (; i + LANES <= width; i += LANES) store(out + i, value(load(hidden + i), load(weight + i)));
  if (i < width)
    store_first(out + i, value(load_first(hidden + i, width - i), load_first(weight + i, width - i)), width - i);
}

}  // namespace

void normalize_row(const void* hidden, Element hidden_element, std::size_t width, const Norm& norm, float* out) {
  const bool wide_weight = norm.element == Element::float32;
  if (hidden_element == Element::float32) {
    const float* row = static_cast<const float*>(hidden);
    wide_weight ? normalize<float, float>(row, width, norm, out) : normalize<float, std::uint16_t>(row, width, norm, out);
  } else {
    const std::uint16_t* row = static_cast<const std::uint16_t*>(hidden);
    wide_weight ? normalize<std::uint16_t, float>(row, width, norm, out)
                : normalize<std::uint16_t, std::uint16_t>(row, width, norm, out);
  }
}

}  // namespace freehold::FREEHOLD_FORM
