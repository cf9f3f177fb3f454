#include "program.h"

#include <stdexcept>
#include <string>

namespace freehold {
namespace {

Residual with_norm_of(const Residual& hidden, const Residual& block) {
  Residual residual = hidden;
  residual.norm = block.norm;
  return residual;
}

}  // namespace

void Program::run(const Kernels& form, int num_threads, const Residual& hidden, const Batch& batch) const {
  struct Runner {
    const Kernels& form;
    int num_threads;
    const Residual& hidden;
    const Batch& batch;

    void operator()(Mlp call) const {
      call.residual = with_norm_of(hidden, call.residual);
      form.mlp(call, num_threads);
    }
    void operator()(AttentionMixer call) const {
      call.residual = with_norm_of(hidden, call.residual);
      call.attention.batch = batch;
      form.attention(call, num_threads);
    }
    void operator()(Mamba2Mixer call) const {
      call.residual = with_norm_of(hidden, call.residual);
      call.mamba2.batch = batch;
      form.mamba2(call, num_threads);
    }
    void operator()(Moe call) const {
      call.residual = with_norm_of(hidden, call.residual);
      form.moe(call, num_threads);
    }
  };
  for (const Call& call : calls_) std::visit(Runner{form, num_threads, hidden, batch}, call);
}

void Program::run_from_tokens(const Kernels& form, int num_threads, const std::int64_t* tokens, const Residual& hidden,
                              const Batch& batch) const {
  for (std::size_t i = 0; i < hidden.num_tokens; ++i)
    if (tokens[i] < 0 || tokens[i] >= static_cast<std::int64_t>(table_.num_rows))
      throw std::out_of_range("token " + std::to_string(tokens[i]) + " of " + std::to_string(table_.num_rows));
  form.embed(table_, tokens, hidden, num_threads);
  run(form, num_threads, hidden, batch);
}

void Program::read(const Kernels& form, int num_threads, const std::int64_t* tokens, Residual hidden,
                   const Batch& batch) const {
  run_from_tokens(form, num_threads, tokens, hidden, batch);
  hidden.norm = norm_;
  form.rms_norm(hidden, hidden.hidden, num_threads);
}

void Program::predict(const Kernels& form, int num_threads, const std::int64_t* tokens, Residual hidden,
                      const Batch& batch, void* logits) const {
  run_from_tokens(form, num_threads, tokens, hidden, batch);
  for (std::int32_t b = 0; b < batch.num_sequences; ++b) {  // row b is read before it is written: it is no later one
    const Residual last{hidden.row(batch.starts[b + 1] - 1), hidden.element, 1, hidden.width, norm_};
    form.rms_norm(last, hidden.row(b), num_threads);
  }
  const std::size_t num_rows = static_cast<std::size_t>(batch.num_sequences);
  form.linear({hidden.hidden, hidden.element, num_rows, head_, nullptr, Element::float32, logits, hidden.element},
              num_threads);
}

}  // namespace freehold
