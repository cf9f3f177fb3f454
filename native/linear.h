// Products of a weight matrix with rows, one panel of sixteen outputs at a time.
#pragma once

#include "matrix.h"

namespace freehold::FREEHOLD_FORM {

void multiply_quantized(const PanelCall& call);
void multiply_float(const PanelCall& call);

// Rows of each of the nearly equal tiles that `num_rows` make: 8 rows are 4 and 4, not 6 and 2, for a tile of few rows
// waits for its own sums.
inline std::size_t tile_height(std::size_t num_rows, std::size_t most) {
  const std::size_t num_tiles = (num_rows + most - 1) / most;
  return (num_rows + num_tiles - 1) / num_tiles;
}

inline void multiply(const PanelCall& call) {
  call.matrix->is_quantized() ? multiply_quantized(call) : multiply_float(call);
}

}  // namespace freehold::FREEHOLD_FORM
