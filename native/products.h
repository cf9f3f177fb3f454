// Products of matrices that lie in cache: what the gradient of a chunk of tokens is made of.
//
//   to = keep * before + a b          to is [rows, columns], a is [rows, depth], b is [depth, columns]
//
// Lanes are columns. b lies in panels, sixteen columns side by side, one depth after the other; a may lie as it likes.
// An output's order of summation depends on the depth alone. The inner loop is that of `multiply_tile`: for six rows two
// loads of b and six broadcasts of a feed twelve fused products of eight lanes, and the multipliers are the bound.
#pragma once

#include <cstddef>

#include "linear.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {

struct Factor {
  const float* values;
  std::size_t row_pitch, depth_pitch;

  Factor from(std::size_t row, std::size_t depth) const {
    return {values + row * row_pitch + depth * depth_pitch, row_pitch, depth_pitch};
  }
};

struct Panels {
  float* values;
  std::size_t depth;  // of all panels

  float* at(std::size_t panel, std::size_t k = 0) const { return values + (panel * depth + k) * LANES; }
};

struct Target {
  float* values;
  std::size_t pitch;
  const float* before = nullptr;  // nothing, or of the same pitch; may be `values`
  float keep = 1.0f;

  Target from(std::size_t row, std::size_t column) const {
    const std::size_t offset = row * pitch + column;
    return {values + offset, pitch, before ? before + offset : nullptr, keep};
  }
};
// Adds to what is there.
inline Target onto(float* values, std::size_t pitch) { return {values, pitch, values, 1.0f}; }

template <int rows>
inline void multiply_tile(const Factor& a, const float* panel, std::size_t depth, const Target& to) {
  F32 sums[rows];
  const float* row[rows];
  for (int m = 0; m < rows; ++m) {
    sums[m] = to.before ? splat(to.keep) * load(to.before + m * to.pitch) : splat(0.0f);
    row[m] = a.values + m * a.row_pitch;
  }
  for (std::size_t k = 0; k < depth; ++k, panel += LANES) {
    const F32 b = load(panel);
    for (int m = 0; m < rows; ++m) sums[m] = fma(b, splat(row[m][k * a.depth_pitch]), sums[m]);
  }
  for (int m = 0; m < rows; ++m) store(to.values + m * to.pitch, sums[m]);
}

template <int rows>
inline void multiply_up_to(std::size_t count, const Factor& a, const float* panel, std::size_t depth, const Target& to) {
  if constexpr (rows > 0) {
    if (count < rows) return multiply_up_to<rows - 1>(count, a, panel, depth, to);
    multiply_tile<rows>(a, panel, depth, to);
  }
}

// One panel: sixteen columns of `num_rows` rows, from depth `first` of the panel on.
inline void multiply_columns(const Factor& a, std::size_t num_rows, const float* panel, std::size_t depth, const Target& to) {
  constexpr int AT_ONCE = 6;
  if (num_rows == 0) return;
  const std::size_t height = tile_height(num_rows, AT_ONCE);
  for (std::size_t m = 0; m < num_rows; m += height)
    multiply_up_to<AT_ONCE>(num_rows - m < height ? num_rows - m : height, a.from(m, 0), panel, depth, to.from(m, 0));
}

// All columns of some rows, over depths [first, stop).
inline void multiply_all(const Factor& a, std::size_t num_rows, const Panels& b, std::size_t num_columns,
                         std::size_t first, std::size_t stop, const Target& to) {
  for (std::size_t column = 0; column < num_columns; column += LANES)
    multiply_columns(a.from(0, first), num_rows, b.at(column / LANES, first), stop - first, to.from(0, column));
}

// Rows [depth, columns] as panels.
inline void pack_rows(const float* from, std::size_t depth, std::size_t num_columns, const Panels& to) {
  for (std::size_t column = 0; column < num_columns; column += LANES)
    for (std::size_t k = 0; k < depth; ++k) store(to.at(column / LANES, k), load(from + k * num_columns + column));
}

// The same rows as columns: sixteen of them to a panel, zeros in the place of absent ones. The depth is the old columns.
inline void pack_columns(const float* from, std::size_t num_rows, std::size_t depth, const Panels& to) {
  for (std::size_t row = 0; row < num_rows; row += LANES)
    for (std::size_t k = 0; k < depth; k += LANES) {
      float* panel = to.at(row / LANES, k);
      if (row + LANES <= num_rows) {
        transpose(from + row * depth + k, depth, panel);
        continue;
      }
      float rows[LANES * LANES] = {};
      for (std::size_t i = 0; i < num_rows - row; ++i) store(rows + i * LANES, load(from + (row + i) * depth + k));
      transpose(rows, LANES, panel);
    }
}

}  // namespace freehold::FREEHOLD_FORM
