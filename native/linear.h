// Products of a weight matrix with rows, one panel of sixteen outputs at a time.
#pragma once

#include "matrix.h"

namespace freehold::FREEHOLD_FORM {

void multiply_packed(const PanelCall& call);
void multiply_plain(const PanelCall& call);

inline void multiply(const PanelCall& call) {
  call.matrix->is_plain() ? multiply_plain(call) : multiply_packed(call);
}

}  // namespace freehold::FREEHOLD_FORM
