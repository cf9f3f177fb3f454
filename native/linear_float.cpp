// Products of float32 and bfloat16 matrices with float32 rows. Lanes are outputs:
//
//   partial = fma(w[k], x[k], partial)     k in order within a block of BLOCK columns
//   out     = out + partial                blocks in order from 0
//
// That order depends on K alone, so a matrix gives the same bits in panels and row after row. In panels (bfloat16 only,
// packed when a model is loaded) it streams from memory. Row after row, as in files and in torch, sixteen rows are
// turned a block of columns at a time. Blocks keep the rounding error of a long sum small, and in float32 (16 KB) fit L1.
//
// Bytes: the matrix's own. Operations: 2 per weight and row. Few rows of panels wait for memory; turning costs one row
// about as much as the products do; with many rows the multipliers are the bound.
#include "linear.h"

#include "simd.h"

namespace freehold::FREEHOLD_FORM {
namespace {

constexpr std::size_t BLOCK = 256;
constexpr std::size_t ROWS_AT_ONCE = 6;
constexpr std::size_t FEW_ROWS = 2 * ROWS_AT_ONCE;  // that meet bfloat16 panels as they lie; more want them widened once

// Turns `num_rows` (at most sixteen) rows of `width` columns into `to` [width, 16]; absent rows become zeros.
template <typename Element>
void turn(const Element* from, std::size_t stride, std::size_t num_rows, std::size_t width, float* to) {
  std::size_t k = 0;
  if (num_rows == PANEL_ROWS)
    for (; k + LANES <= width; k += LANES) transpose(from + k, stride, to + k * PANEL_ROWS);
  for (; k < width; ++k)
    for (std::size_t n = 0; n < PANEL_ROWS; ++n) to[k * PANEL_ROWS + n] = n < num_rows ? wide(from[n * stride + k]) : 0.0f;
}

void widen(const std::uint16_t* panel, std::size_t width, float* to) {
  for (std::size_t k = 0; k < width; ++k) store(to + k * PANEL_ROWS, load(panel + k * PANEL_ROWS));
}

template <int rows, typename Element>
inline void add_block(const Element* block, std::size_t width, const float* const* row, std::size_t count, float* out,
                      std::size_t stride, bool is_first) {
  if constexpr (rows > 0) {
    if (count < rows) return add_block<rows - 1>(block, width, row, count, out, stride, is_first);
    F32 partial[rows];
    for (int m = 0; m < rows; ++m) partial[m] = splat(0.0f);
    const auto add = [&](std::size_t k) {
      const F32 weights = load(block + k * PANEL_ROWS);
      for (int m = 0; m < rows; ++m) partial[m] = fma(weights, splat(row[m][k]), partial[m]);
    };
    std::size_t k = 0;
    if constexpr (sizeof(Element) == sizeof(std::uint16_t))  // from memory, two columns a cache line
      for (; k + 2 <= width; k += 2) {
        read_ahead<64>(block + k * PANEL_ROWS);
        add(k);
        add(k + 1);
      }
    for (; k < width; ++k) add(k);
    for (int m = 0; m < rows; ++m)
      store(out + m * stride, is_first ? partial[m] : load(out + m * stride) + partial[m]);
  }
}

// Columns k to k + width of all rows with one block.
template <typename Element>
inline void add_rows(const PanelCall& call, const Element* block, std::size_t k, std::size_t width) {
  const std::size_t height = tile_height(call.num_rows, ROWS_AT_ONCE);
  for (std::size_t m = 0; m < call.num_rows; m += height) {
    const std::size_t count = call.num_rows - m < height ? call.num_rows - m : height;
    const float* row[ROWS_AT_ONCE];
    for (std::size_t i = 0; i < count; ++i) row[i] = static_cast<const float*>(call.rows[m + i]) + k;
    add_block<static_cast<int>(ROWS_AT_ONCE)>(block, width, row, count, call.out + m * call.stride, call.stride, k == 0);
  }
}

// Calls `use(k, width)` for each block of columns.
template <typename Use>
inline void for_each_block(std::size_t columns, Use&& use) {
  for (std::size_t k = 0; k < columns; k += BLOCK) use(k, columns - k < BLOCK ? columns - k : BLOCK);
}

template <typename Element>
void multiply_rows(const PanelCall& call) {
  const std::size_t columns = call.matrix->num_columns, first_row = call.panel * PANEL_ROWS;
  const std::size_t left = call.matrix->num_rows - first_row, num_rows = left < PANEL_ROWS ? left : PANEL_ROWS;
  const Element* weights = reinterpret_cast<const Element*>(call.matrix->data) + first_row * columns;
  alignas(64) float block[BLOCK * PANEL_ROWS];
  for_each_block(columns, [&](std::size_t k, std::size_t width) {
    turn(weights + k, columns, num_rows, width, block);
    add_rows(call, block, k, width);
  });
}

void multiply_panel_of_bf16(const PanelCall& call) {
  const std::size_t columns = call.matrix->num_columns;
  const std::uint16_t* panel = reinterpret_cast<const std::uint16_t*>(call.matrix->data) + call.panel * PANEL_ROWS * columns;
  alignas(64) float block[BLOCK * PANEL_ROWS];
  for_each_block(columns, [&](std::size_t k, std::size_t width) {
    if (call.num_rows <= FEW_ROWS) return add_rows(call, panel + k * PANEL_ROWS, k, width);
    widen(panel + k * PANEL_ROWS, width, block);
    add_rows(call, block, k, width);
  });
}

}  // namespace

void multiply_float(const PanelCall& call) {
  switch (call.matrix->format) {
    case Format::float32: return multiply_rows<float>(call);
    case Format::bfloat16: return multiply_rows<std::uint16_t>(call);
    default: return multiply_panel_of_bf16(call);
  }
}

}  // namespace freehold::FREEHOLD_FORM
