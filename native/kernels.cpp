#include "kernels.h"

#include "attention_mixer.h"
#include "mamba2_gradient.h"
#include "mamba2_mixer.h"
#include "mlp.h"
#include "moe.h"
#include "pack.h"

#define FREEHOLD_QUOTED_AGAIN(name) #name
#define FREEHOLD_QUOTED(name) FREEHOLD_QUOTED_AGAIN(name)

namespace freehold::FREEHOLD_FORM {
namespace {

// Copies a row of `width` elements, widening or rounding them.
void load_row(const void* rows, Element element, std::size_t first, std::size_t width, float* to) {
  for (std::size_t i = 0; i < width; i += LANES) {
    const std::size_t count = width - i < LANES ? width - i : LANES;
    store_first(to + i, load_any(rows, element, first + i, count), count);
  }
}

constexpr std::size_t ALONE_ROWS = 16;  // for so few a team is not worth its start

// `out` may be where the rows come from.
void rms_norm(const Residual& from, void* out, int num_threads) {
  if (from.num_tokens <= ALONE_ROWS) num_threads = 1;
  Scratch& memory = scratch();
  memory.reset();
  float* rows = memory.take<float>(num_threads * from.width);  // one for each member
  run_team(num_threads, [&](Team& team, int member) {
    float* row = rows + member * from.width;
    for_each(team, from.num_tokens, grain_of(team, from.num_tokens), [&](std::size_t token) {
      normalize_row(from.row(token), from.element, from.width, from.norm, row);
      for (std::size_t i = 0; i < from.width; i += LANES) {
        const std::size_t count = from.width - i < LANES ? from.width - i : LANES;
        store_any(out, from.element, token * from.width + i, load_first(row + i, count), count);
      }
    });
  });
}

// The rows of an embedding table that belong to tokens, which are within it.
void embed(const Matrix& table, const std::int64_t* tokens, const Residual& to, int num_threads) {
  const std::size_t width = to.width;
  Scratch& memory = scratch();
  memory.reset();
  float* rows = memory.take<float>(num_threads * width);  // one for each member
  if (to.num_tokens < static_cast<std::size_t>(num_threads)) num_threads = static_cast<int>(to.num_tokens);
  run_team(num_threads, [&](Team& team, int member) {
    float* row = rows + member * width;
    for_each(team, to.num_tokens, grain_of(team, to.num_tokens), [&](std::size_t token) {
      const std::size_t number = static_cast<std::size_t>(tokens[token]);
      if (is_plain(table.format))
        load_row(table.data, table.format == Format::float32 ? Element::float32 : Element::bfloat16, number * width, width, row);
      else
        unpack_row(table, number, row);
      for (std::size_t i = 0; i < width; i += LANES) {
        const std::size_t count = width - i < LANES ? width - i : LANES;
        store_any(to.row(token), to.element, i, load_first(row + i, count), count);
      }
    });
  });
}

void linear(const Linear& call, int num_threads) {
  Scratch& memory = scratch();
  memory.reset();
  const std::size_t width = call.matrix.num_columns, stride = call.matrix.num_rows;
  const Rows rows = take_rows(memory, call.num_rows, width, call.matrix.is_quantized());
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, call.num_rows, 1, [&](std::size_t m) {
      load_row(call.rows, call.element, m * width, width, rows.row(m));
      rows.quantize(m);
    });
    team.barrier();
    for_each(team, call.matrix.num_panels(), grain_of(team, call.matrix.num_panels()), [&](std::size_t panel) {
      multiply_panel(call.matrix, panel, rows.of(call.matrix), rows.num_rows, [&](const PanelOutputs& out) {
        F32 bias = splat(0.0f);
        if (call.bias) bias = load_any(call.bias, call.bias_element, out.first_column, out.num_columns);
        for (std::size_t m = 0; m < out.num_rows; ++m)
          store_any(call.out, call.out_element, (out.first_row + m) * stride + out.first_column,
                    load(out.values + m * PANEL_ROWS) + bias, out.num_columns);
      });
    });
  });
}

}  // namespace

const Kernels& kernels() {
  static const Kernels mine{FREEHOLD_QUOTED(FREEHOLD_FORM), rms_norm, embed, linear, sample,
                            mlp, attention_mixer, mamba2_mixer, mamba2_inner, mamba2_gradient, moe,
                            choose_experts, sum_chosen, squares_gradient, norm_gradient, activate,
                            activation_gradient, cross_entropy, attention_inner, attention_gradient,
                            multiply_in_registers, read_memory};
  return mine;
}

}  // namespace freehold::FREEHOLD_FORM
