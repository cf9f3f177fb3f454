#include "mlp.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Thirty-two columns of a product, two panels side by side: values [rows, GROUP].
void multiply_group(const Matrix& matrix, std::size_t j, const void* const* rows, std::size_t num_rows, float* values) {
  multiply({&matrix, 2 * j, rows, num_rows, values, GROUP});
  if (2 * j + 1 < matrix.num_panels()) multiply({&matrix, 2 * j + 1, rows, num_rows, values + PANEL_ROWS, GROUP});
}

}  // namespace

void activate_columns(const Matrix& gate, const Matrix& up, const void* const* rows, std::size_t num_rows, std::size_t j,
                      const Rows& inner, std::size_t first_inner_row) {
  alignas(64) float up_values[CHUNK_ROWS * GROUP], gate_values[CHUNK_ROWS * GROUP];
  const std::size_t left = up.num_rows - j * GROUP, width = left < GROUP ? left : GROUP;
  for (std::size_t m = 0; m < num_rows; m += CHUNK_ROWS) {
    const std::size_t count = num_rows - m < CHUNK_ROWS ? num_rows - m : CHUNK_ROWS;
    multiply_group(up, j, rows + m, count, up_values);
    if (gate) multiply_group(gate, j, rows + m, count, gate_values);
    for (std::size_t i = 0; i < count; ++i) {
      const float *u = up_values + i * GROUP, *g = gate_values + i * GROUP;
      const auto half = [&](std::size_t at) {
        return gate ? silu(load(g + at)) * load(u + at) : squared_relu(load(u + at));
      };
      const std::size_t row = first_inner_row + m + i;
      if (inner.groups && width == GROUP) {
        quantize_group(half(0), half(LANES), inner.row_groups(row) + j);
      } else {
        store_first(inner.row(row) + j * GROUP, half(0), width < LANES ? width : LANES);
        if (width > LANES) store_first(inner.row(row) + j * GROUP + LANES, half(LANES), width - LANES);
      }
    }
  }
}

void mlp(const Mlp& call, int num_threads) {
  const Residual& residual = call.residual;
  const std::size_t num_tokens = residual.num_tokens, inner_width = call.up.num_rows;
  Scratch& memory = scratch();
  memory.reset();
  const Rows normed = take_rows(memory, num_tokens, residual.width, call.up.is_quantized());
  const Rows inner = take_rows(memory, num_tokens, inner_width, call.down.is_quantized());
  const std::size_t num_columns = (inner_width + GROUP - 1) / GROUP;
  run_team(num_threads, [&](Team& team, int) {
    prepare(team, residual, normed);
    team.barrier();
    for_each(team, num_columns, grain_of(team, num_columns), [&](std::size_t j) {
      activate_columns(call.gate, call.up, normed.of(call.up), num_tokens, j, inner, 0);
    });
    team.barrier();
    add_product(team, residual, inner, call.down);
  });
}

}  // namespace freehold::FREEHOLD_FORM
