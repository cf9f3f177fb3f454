// The mixture-of-experts mixer; the twin is src/freehold/ops/moe.py.
#pragma once

#include "mixers.h"

namespace freehold::FREEHOLD_FORM {

void moe(const Moe& call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
