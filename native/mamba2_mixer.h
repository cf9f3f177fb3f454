// The Mamba-2 mixer: norm, input projection, convolution, scan, gate and norm, output projection, residual sum.
#pragma once

#include "mixers.h"

namespace freehold::FREEHOLD_FORM {

void mamba2_mixer(Mamba2Mixer call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
