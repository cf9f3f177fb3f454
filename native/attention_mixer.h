// The attention mixer: norm, q/k/v, rotation and page write, attention, output projection, residual sum.
#pragma once

#include "mixers.h"

namespace freehold::FREEHOLD_FORM {

void attention_mixer(AttentionMixer call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
