#include "program.h"

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

}  // namespace freehold
