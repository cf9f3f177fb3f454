// A decoder as a list of calls, so that a step of it is one.
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

  // What comes before the blocks and after them; a program of blocks alone has neither.
  void set_ends(const Matrix& table, const Norm& norm, const Matrix& head) { table_ = table, norm_ = norm, head_ = head; }

  // Runs all blocks on hidden, in place.
  void run(const Kernels& form, int num_threads, const Residual& hidden, const Batch& batch) const;

  // From tokens to the hidden states after the final norm. Throws out_of_range for a token that the table has not.
  void read(const Kernels& form, int num_threads, const std::int64_t* tokens, Residual hidden, const Batch& batch) const;

  // From tokens to the logits [B, V] of what follows each sequence's last token, in the hidden states' element. Throws
  // as `read` does. Hidden is of no use afterwards.
  void predict(const Kernels& form, int num_threads, const std::int64_t* tokens, Residual hidden, const Batch& batch,
               void* logits) const;

 private:
  void run_from_tokens(const Kernels& form, int num_threads, const std::int64_t* tokens, const Residual& hidden,
                       const Batch& batch) const;

  std::vector<Call> calls_;
  Matrix table_, head_;  // [V, D]
  Norm norm_{};
};

}  // namespace freehold
