// From a row of logits to one token. The twin, and the specification, is `sample` in ops/sampling.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freehold {

struct Draw {
  const float* logits;
  double temperature, top_p, min_p, uniform;
  std::int64_t top_k;
};

}  // namespace freehold

namespace freehold::FREEHOLD_FORM {

// Writes the token of each row; where a row holds a NaN, the place of the first one.
void sample(const Draw* draws, std::size_t num_rows, std::size_t width, std::int64_t* tokens, int num_threads);

}  // namespace freehold::FREEHOLD_FORM
