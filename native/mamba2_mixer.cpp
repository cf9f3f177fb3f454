#include "mamba2_mixer.h"

#include "phases.h"

namespace freehold::FREEHOLD_FORM {

void mamba2_mixer(Mamba2Mixer call, int num_threads) {
  const Residual& residual = call.residual;
  const std::size_t num_tokens = residual.num_tokens, inner_width = call.output.num_columns;
  const std::size_t projected_width = call.input.num_rows;
  Scratch& memory = scratch();
  memory.reset();
  const Rows normed = take_rows(memory, num_tokens, residual.width, call.input.is_quantized());
  const Rows mixed = take_rows(memory, num_tokens, inner_width, call.output.is_quantized());
  float* projected = memory.take<float>(num_tokens * projected_width);
  const std::size_t shared_width = 2 * static_cast<std::size_t>(call.mamba2.num_groups * call.mamba2.state_size);
  call.mamba2.projected = projected;
  call.mamba2.mixed = memory.take<float>(num_tokens * (inner_width + shared_width));
  call.mamba2.out = mixed.floats;
  run_team(num_threads, [&](Team& team, int) {
    prepare(team, residual, normed);
    team.barrier();
    write_product(team, normed, call.input, projected);
    team.barrier();
    convolve(team, call.mamba2);
    team.barrier();
    scan(team, call.mamba2);
    team.barrier();
    gate_and_normalize(team, call.mamba2);
    team.barrier();
    quantize_all(team, mixed);
    add_product(team, residual, mixed, call.output);
  });
}

}  // namespace freehold::FREEHOLD_FORM
