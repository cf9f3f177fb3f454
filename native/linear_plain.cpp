// Products of plain float32 and bfloat16 matrices, as they lie in files and in torch, with float32 rows.
//
// Sixteen rows of the matrix are turned a block of columns at a time, so that lanes are outputs:
//
//   partial = fma(w[k], x[k], partial)     k in order within a block of BLOCK columns
//   out     = out + partial                blocks in order from 0
//
// That order depends on K alone. Blocks keep the rounding error of a long sum small, and in float32 (16 KB) fit L1.
//
// Bytes: the matrix's own. Operations: 2 per weight and row; for one row the turning costs about as much as the
// products and both wait for memory, for many rows it disappears and the multipliers are the bound.
#include "linear.h"

#include "simd.h"

namespace freehold::FREEHOLD_FORM {
namespace {

constexpr std::size_t BLOCK = 256;
constexpr int ROWS_AT_ONCE = 6;

// Turns `num_rows` (at most sixteen) rows of `width` columns into `to` [width, 16]; absent rows become zeros.
template <typename Element>
void turn(const Element* from, std::size_t stride, std::size_t num_rows, std::size_t width, float* to) {
  std::size_t k = 0;
  if (num_rows == PANEL_ROWS)
    for (; k + LANES <= width; k += LANES) transpose(from + k, stride, to + k * PANEL_ROWS);
  for (; k < width; ++k)
    for (std::size_t n = 0; n < PANEL_ROWS; ++n) to[k * PANEL_ROWS + n] = n < num_rows ? wide(from[n * stride + k]) : 0.0f;
}

template <int rows>
inline void add_block(const float* block, std::size_t width, const float* const* row, std::size_t count, float* out,
                      std::size_t stride, bool is_first) {
  if constexpr (rows > 0) {
    if (count < rows) return add_block<rows - 1>(block, width, row, count, out, stride, is_first);
    F32 partial[rows];
    for (int m = 0; m < rows; ++m) partial[m] = splat(0.0f);
    for (std::size_t k = 0; k < width; ++k) {
      const F32 weights = load(block + k * PANEL_ROWS);
      for (int m = 0; m < rows; ++m) partial[m] = fma(weights, splat(row[m][k]), partial[m]);
    }
    for (int m = 0; m < rows; ++m)
      store(out + m * stride, is_first ? partial[m] : load(out + m * stride) + partial[m]);
  }
}

template <typename Element>
void plain_product(const PanelCall& call) {
  const std::size_t columns = call.matrix->num_columns, first_row = call.panel * PANEL_ROWS;
  const std::size_t left = call.matrix->num_rows - first_row, num_rows = left < PANEL_ROWS ? left : PANEL_ROWS;
  const Element* weights = reinterpret_cast<const Element*>(call.matrix->data) + first_row * columns;
  alignas(64) float block[BLOCK * PANEL_ROWS];
  for (std::size_t k = 0; k < columns; k += BLOCK) {
    const std::size_t width = columns - k < BLOCK ? columns - k : BLOCK;
    turn(weights + k, columns, num_rows, width, block);
    for (std::size_t m = 0; m < call.num_rows; m += ROWS_AT_ONCE) {
      const std::size_t count = call.num_rows - m < ROWS_AT_ONCE ? call.num_rows - m : ROWS_AT_ONCE;
      const float* row[ROWS_AT_ONCE];
      for (std::size_t i = 0; i < count; ++i) row[i] = static_cast<const float*>(call.rows[m + i]) + k;
      add_block<ROWS_AT_ONCE>(block, width, row, count, call.out + m * call.stride, call.stride, k == 0);
    }
  }
}

}  // namespace

void multiply_plain(const PanelCall& call) {
  call.matrix->format == Format::float32 ? plain_product<float>(call) : plain_product<std::uint16_t>(call);
}

}  // namespace freehold::FREEHOLD_FORM
