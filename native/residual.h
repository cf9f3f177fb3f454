// A residual block's stream of tokens, which every mixer reads through a norm and adds to.
#pragma once

#include <cstddef>

#include "elements.h"

namespace freehold {

// RMSNorm; the specification is rms_norm_reference in src/freehold/ops/norm.py.
struct Norm {
  const void* weight;  // [D]
  Element element;     // of the weight
  float eps;
  bool cast_then_multiply;  // round to the hidden row's element before the weight, and again after it
};

// A residual block's stream: hidden = hidden + mixer(norm(hidden)).
struct Residual {
  void* hidden;  // [T, D]
  Element element;
  std::size_t num_tokens;  // T
  std::size_t width;       // D
  Norm norm;

  void* row(std::size_t token) const {
    return static_cast<unsigned char*>(hidden) + token * width * (element == Element::float32 ? 4 : 2);
  }
};

}  // namespace freehold
