#include "mamba2_mixer.h"

#include "phases.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Phases: everything between the projections.
void mix(Team& team, const Mamba2& call) {
  convolve(team, call);
  team.barrier();
  scan(team, call);
  team.barrier();
  gate_and_normalize(team, call);
}

}  // namespace

void mamba2_inner(const Mamba2& call, int num_threads) {
  run_team(num_threads, [&](Team& team, int) { mix(team, call); });
}

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
    mix(team, call.mamba2);
    team.barrier();
    quantize_all(team, mixed);
    add_product(team, residual, mixed, call.output);
  });
}

}  // namespace freehold::FREEHOLD_FORM
