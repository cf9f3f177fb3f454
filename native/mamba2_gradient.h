// The gradient of what lies between the projections of a Mamba-2 mixer.
#pragma once

#include "mamba2.h"

namespace freehold::FREEHOLD_FORM {

void mamba2_gradient(const Mamba2Gradient& gradient, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
