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

// The gradient of relu(x) ** 2 [rows, width] that counts `weight` times for each row: `out`, the gradient of what it
// counts for, becomes that of x; of_weights [rows] are written.
void squares_gradient(const float* squares, const float* weights, std::size_t num_rows, std::size_t width, float* out,
                      float* of_weights, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
