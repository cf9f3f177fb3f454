// The Mamba-2 mixer: norm, input projection, convolution, scan, gate and norm, output projection, residual sum.
#pragma once

#include "mixers.h"

namespace freehold::FREEHOLD_FORM {

// What lies between the projections alone; every address of the call is set.
void mamba2_inner(const Mamba2& call, int num_threads);

void mamba2_mixer(Mamba2Mixer call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
