#include "attention_mixer.h"

#include "phases.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Phase: queries, keys and values of every token side by side, with their biases.
void project(Team& team, const AttentionMixer& call, const Rows& normed) {
  const std::size_t first[3] = {0, call.qkv[0].num_panels(), call.qkv[0].num_panels() + call.qkv[1].num_panels()};
  const std::size_t num_panels = first[2] + call.qkv[2].num_panels();
  const std::size_t columns[3] = {0, call.qkv[0].num_rows, call.qkv[0].num_rows + call.qkv[1].num_rows};
  const std::size_t stride = columns[2] + call.qkv[2].num_rows;
  for_each(team, num_panels, grain_of(team, num_panels), [&](std::size_t panel) {
    const int which = panel < first[1] ? 0 : panel < first[2] ? 1 : 2;
    const Matrix& matrix = call.qkv[which];
    multiply_panel(matrix, panel - first[which], normed.of(matrix), normed.num_rows, [&](const PanelOutputs& out) {
      F32 bias = splat(0.0f);
      if (call.biases[which]) bias = load_any(call.biases[which], call.bias_element, out.first_column, out.num_columns);
      float* to = call.attention.qkv + out.first_row * stride + columns[which] + out.first_column;
      for (std::size_t m = 0; m < out.num_rows; ++m)
        store_first(to + m * stride, load(out.values + m * PANEL_ROWS) + bias, out.num_columns);
    });
  });
}

}  // namespace

void attention_mixer(AttentionMixer call, int num_threads) {
  const Residual& residual = call.residual;
  const std::size_t num_tokens = residual.num_tokens, inner_width = call.output.num_columns;
  Scratch& memory = scratch();
  memory.reset();
  bool quantized_in = false;
  for (const Matrix& matrix : call.qkv) quantized_in = quantized_in || matrix.is_quantized();
  const Rows normed = take_rows(memory, num_tokens, residual.width, quantized_in);
  const Rows mixed = take_rows(memory, num_tokens, inner_width, call.output.is_quantized());
  const std::size_t stride = call.qkv[0].num_rows + call.qkv[1].num_rows + call.qkv[2].num_rows;
  call.attention.qkv = memory.take<float>(num_tokens * stride);
  call.attention.out = mixed.floats;
  run_team(num_threads, [&](Team& team, int) {
    prepare(team, residual, normed);
    team.barrier();
    project(team, call, normed);
    team.barrier();
    rotate_and_write(team, call.attention);
    team.barrier();
    attend(team, call.attention);
    team.barrier();
    quantize_all(team, mixed);
    add_product(team, residual, mixed, call.output);
  });
}

}  // namespace freehold::FREEHOLD_FORM
