// Weights as kernels read them, and the rows that they meet.
//
// A plain matrix is a tensor as it lies in a file or in torch: [N, K], row after row. A packed one has the values of a
// GGUF format at their stored width, rearranged into panels of sixteen rows so that lanes are rows: quantized ones as
// formats.h says, bfloat16 as [K, 16].
#pragma once

#include <cstddef>
#include <cstdint>

namespace freehold {

constexpr std::size_t PANEL_ROWS = 16;
constexpr std::size_t GROUP = 32;  // weights that share a scale, and row elements that do

enum class Format : int { float32, bfloat16, bf16_panels, q8_0, q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k };
constexpr int NUM_FORMATS = 11;

constexpr bool is_plain(Format format) { return format == Format::float32 || format == Format::bfloat16; }
constexpr bool is_quantized(Format format) { return format > Format::bf16_panels; }

struct Matrix {
  Format format = Format::float32;
  const std::uint8_t* data = nullptr;  // null: there is no such matrix
  std::size_t num_rows = 0;            // N, outputs
  std::size_t num_columns = 0;         // K, inputs; whole groups (or super-blocks) where quantized

  explicit operator bool() const { return data != nullptr; }
  bool is_quantized() const { return freehold::is_quantized(format); }
  std::size_t num_panels() const { return (num_rows + PANEL_ROWS - 1) / PANEL_ROWS; }
};

// Thirty-two elements of a row, quantized: element i is scale * values[i].
struct RowGroup {
  std::int8_t values[GROUP];
  float scale;
  std::int32_t sum;         // of all values
  std::int32_t first_half;  // of the first sixteen
};
static_assert(sizeof(RowGroup) == 44);

// One panel's products with rows: out[m * stride + n] = sum over k of row m's element k times the panel's row n's.
// Rows are RowGroups where the matrix is quantized, floats where not. The last panel may have fewer than sixteen rows;
// sixteen outputs are written all the same.
struct PanelCall {
  const Matrix* matrix;
  std::size_t panel;
  const void* const* rows;  // [M], the start of each
  std::size_t num_rows;     // M
  float* out;
  std::size_t stride;
};

}  // namespace freehold
