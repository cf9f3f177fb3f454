// What training computes beside products: the gradient of norms, activations and their gradients, the loss of logits.
#pragma once

#include <cstdint>

#include "residual.h"

namespace freehold {

// The gradient of RMSNorm; no rounding inside it counts.
struct NormGradient {
  Residual from;
  const float* out;      // [T, D], the gradient to begin with
  void* hidden;          // [T, D], of the elements that `from` has; null where nobody wants it
  float* weight;         // [D], or null
};

// silu(gate) * up, or relu(up) ** 2 where there is no gate; all are `count` elements long.
struct Activation {
  const float* gate;
  const float* up;
  std::size_t count;
};

// -log softmax(row)[label] of each row of logits.
struct CrossEntropy {
  float* logits;  // [S, V]; become their gradient
  const std::int64_t* labels;  // [S], within V
  std::size_t num_rows, width;
  float* losses;  // [S]
};

}  // namespace freehold

#ifdef FREEHOLD_FORM
namespace freehold::FREEHOLD_FORM {

void norm_gradient(const NormGradient& call, int num_threads);
void activate(const Activation& call, float* out, int num_threads);
// Mutates: gate_gradient (where there is a gate) and up_gradient; `out` is the gradient to begin with.
void activation_gradient(const Activation& call, const float* out, float* gate_gradient, float* up_gradient, int num_threads);
void cross_entropy(const CrossEntropy& call, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
#endif
