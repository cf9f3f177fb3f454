// Products of a weight matrix with rows, one panel of sixteen outputs at a time.
#pragma once

#include "matrix.h"

namespace freehold::FREEHOLD_FORM {

void multiply_quantized(const PanelCall& call);
void multiply_float(const PanelCall& call);

inline void multiply(const PanelCall& call) {
  call.matrix->is_quantized() ? multiply_quantized(call) : multiply_float(call);
}

}  // namespace freehold::FREEHOLD_FORM
