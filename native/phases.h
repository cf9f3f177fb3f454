// What the mixers' calls share: tokens normed on the way in, products with whole matrices, sums on the way out.
#pragma once

#include "linear.h"
#include "pool.h"
#include "residual.h"
#include "rows.h"
#include "scratch.h"

namespace freehold::FREEHOLD_FORM {

inline F32 load_any(const void* row, Element element, std::size_t at, std::size_t count) {
  if (element == Element::float32) return load_first(static_cast<const float*>(row) + at, count);
  return load_first(static_cast<const std::uint16_t*>(row) + at, count);
}
inline void store_any(void* row, Element element, std::size_t at, F32 value, std::size_t count) {
  if (element == Element::float32) return store_first(static_cast<float*>(row) + at, value, count);
  store_first(static_cast<std::uint16_t*>(row) + at, value, count);
}

// Rows for products, in both forms that matrices may want: floats, and groups where any quantized matrix meets them.
struct Rows {
  std::size_t num_rows = 0, width = 0;
  float* floats = nullptr;       // [rows, width]
  RowGroup* groups = nullptr;    // [rows, width / GROUP]; null where no quantized matrix meets them
  const void** floats_of = nullptr;  // [rows], the start of each in floats
  const void** groups_of = nullptr;  // [rows], in groups

  float* row(std::size_t m) const { return floats + m * width; }
  RowGroup* row_groups(std::size_t m) const { return groups + m * (width / GROUP); }
  const void* const* of(const Matrix& matrix) const { return matrix.is_quantized() ? groups_of : floats_of; }
  void quantize(std::size_t m) const {
    if (groups) quantize_row(row(m), width, row_groups(m));
  }
};

inline Rows take_rows(Scratch& memory, std::size_t num_rows, std::size_t width, bool meets_quantized) {
  Rows rows;
  rows.num_rows = num_rows;
  rows.width = width;
  rows.floats = memory.take<float>(num_rows * width);
  rows.floats_of = memory.take<const void*>(num_rows);
  if (meets_quantized) {
    rows.groups = memory.take<RowGroup>(num_rows * (width / GROUP));
    rows.groups_of = memory.take<const void*>(num_rows);
  }
  for (std::size_t m = 0; m < num_rows; ++m) {
    rows.floats_of[m] = rows.row(m);
    if (meets_quantized) rows.groups_of[m] = rows.row_groups(m);
  }
  return rows;
}

// Gives each of `count` items, `grain` at a time, to whichever member asks first; no barrier at the end.
template <typename Work>
inline void for_each(Team& team, std::size_t count, std::size_t grain, Work&& work) {
  for (std::size_t begin; (begin = team.claim() * grain) < count;)
    for (std::size_t i = begin; i < begin + grain && i < count; ++i) work(i);
}

// Items in a run that are worth a claim: long runs keep memory streaming, several per member even out their speeds.
inline std::size_t grain_of(const Team& team, std::size_t count) {
  const std::size_t grain = count / (6 * static_cast<std::size_t>(team.size()));
  return grain < 1 ? 1 : grain > 16 ? 16 : grain;
}

// Phase: the tokens normed, as rows.
inline void prepare(Team& team, const Residual& residual, const Rows& rows) {
  for_each(team, residual.num_tokens, grain_of(team, residual.num_tokens), [&](std::size_t token) {
    normalize_row(residual.row(token), residual.element, residual.width, residual.norm, rows.row(token));
    rows.quantize(token);
  });
}

// Phase and its barrier, where a quantized matrix will meet the rows: their groups from their floats.
inline void quantize_all(Team& team, const Rows& rows) {
  if (!rows.groups) return;
  for_each(team, rows.num_rows, grain_of(team, rows.num_rows), [&](std::size_t m) { rows.quantize(m); });
  team.barrier();
}

constexpr std::size_t CHUNK_ROWS = 256;  // of products that a member holds before they are used: 16 KB a panel

// Sixteen outputs of up to CHUNK_ROWS rows, from row `first_row` of all on.
struct PanelOutputs {
  std::size_t first_row, num_rows, first_column, num_columns;
  const float* values;  // [num_rows, PANEL_ROWS]
};

// Computes one panel for all rows and hands the outputs to `use`, a chunk of rows at a time.
template <typename Use>
inline void multiply_panel(const Matrix& matrix, std::size_t panel, const void* const* rows, std::size_t num_rows, Use&& use) {
  alignas(64) float values[CHUNK_ROWS * PANEL_ROWS];
  const std::size_t column = panel * PANEL_ROWS, left = matrix.num_rows - column;
  for (std::size_t m = 0; m < num_rows; m += CHUNK_ROWS) {
    const std::size_t count = num_rows - m < CHUNK_ROWS ? num_rows - m : CHUNK_ROWS;
    multiply({&matrix, panel, rows + m, count, values, PANEL_ROWS});
    use(PanelOutputs{m, count, column, left < PANEL_ROWS ? left : PANEL_ROWS, values});
  }
}

// Phase: out = rows times the matrix, [rows, N].
inline void write_product(Team& team, const Rows& rows, const Matrix& matrix, float* out_values) {
  const std::size_t stride = matrix.num_rows;
  for_each(team, matrix.num_panels(), grain_of(team, matrix.num_panels()), [&](std::size_t panel) {
    multiply_panel(matrix, panel, rows.of(matrix), rows.num_rows, [&](const PanelOutputs& out) {
      float* to = out_values + out.first_row * stride + out.first_column;
      for (std::size_t m = 0; m < out.num_rows; ++m)
        store_first(to + m * stride, load(out.values + m * PANEL_ROWS), out.num_columns);
    });
  });
}

// Phase: hidden = hidden + rows times the matrix.
inline void add_product(Team& team, const Residual& residual, const Rows& rows, const Matrix& matrix) {
  for_each(team, matrix.num_panels(), grain_of(team, matrix.num_panels()), [&](std::size_t panel) {
    multiply_panel(matrix, panel, rows.of(matrix), rows.num_rows, [&](const PanelOutputs& out) {
      for (std::size_t m = 0; m < out.num_rows; ++m) {
        void* row = residual.row(out.first_row + m);
        const F32 before = load_any(row, residual.element, out.first_column, out.num_columns);
        const F32 sum = before + load(out.values + m * PANEL_ROWS);
        store_any(row, residual.element, out.first_column, sum, out.num_columns);
      }
    });
  });
}

}  // namespace freehold::FREEHOLD_FORM
