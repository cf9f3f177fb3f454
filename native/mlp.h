// The feed-forward mixers.
#pragma once

#include "mixers.h"
#include "phases.h"

namespace freehold::FREEHOLD_FORM {

inline F32 squared_relu(F32 value) {
  const F32 positive = max(splat(0.0f), value);  // in this order a NaN stays one
  return positive * positive;
}

// Columns 32 j to 32 j + 31 of act(up(x)) for some rows x, written to rows of `inner` in the form that its matrix wants.
// Gate and up are both quantized or both not.
void activate_columns(const Matrix& gate, const Matrix& up, const void* const* rows, std::size_t num_rows, std::size_t j,
                      const Rows& inner, std::size_t first_inner_row);

void mlp(const Mlp& call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
