// A decoder's blocks as a list of calls, so that a step of the whole decoder is one call.
#pragma once

#include <variant>
#include <vector>

#include "kernels.h"

namespace freehold {

class Program {
 public:
  using Call = std::variant<Mlp, AttentionMixer, Mamba2Mixer, Moe>;

  // Adds a block. Of its residual only the norm counts, and its batch does not: both are the run's.
  void add(const Call& call) { calls_.push_back(call); }

  // Runs all blocks on hidden, in place.
  void run(const Kernels& form, int num_threads, const Residual& hidden, const Batch& batch) const;

 private:
  std::vector<Call> calls_;
};

}  // namespace freehold
