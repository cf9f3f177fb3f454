// The mixture-of-experts mixer; the twin is src/freehold/ops/moe.py.
#pragma once

#include "mixers.h"

namespace freehold::FREEHOLD_FORM {

void moe(const Moe& call, int num_threads);

// Two steps of it, for a caller that does what lies between. The router's logits [T, E] -> the experts of each token and
// their weights, [T, X]; the logits become scores. Of `router` only what concerns the choice is read.
void choose_experts(const Moe& router, float* logits, std::size_t num_tokens, std::int32_t* experts, float* weights,
                    int num_threads);

// Results [T X, width] -> their weighted sums [T, width]; places [T, X] say which results are a token's.
void sum_chosen(const float* results, const std::int32_t* places, const float* weights, std::size_t num_tokens,
                int num_chosen, std::size_t width, float* out, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
