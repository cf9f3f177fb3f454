// Tokens are grouped by expert, so each chosen expert's weights are read once a step, at the rate of a dense product;
// each token sums its experts' results in the order of its choice, so the sum does not depend on the other tokens.
//
// Bytes: the chosen experts' weights, once. Operations: as a dense product of T X rows. For few tokens bound by memory.
#include "moe.h"

#include "mlp.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Who says what to whom: T X entries, sorted by expert. The shared expert comes last, with every token.
struct Assignment {
  std::int32_t* experts;    // [T, X], the choice of each token, best first
  float* weights;           // [T, X]
  std::int32_t* places;     // [T, X], where the entry of a token's choice lies among the sorted ones
  std::int32_t* tokens;     // [T X], the token of each sorted entry
  std::int32_t* starts;     // [E + 1], the first sorted entry of each expert
  std::int32_t* up_tasks;   // [E + 1], the first task of each expert; down_tasks the same
  std::int32_t* down_tasks;
};

// Marks the experts outside the best groups as not eligible; a group's rank is the sum of its two best.
void keep_best_groups(const Moe& call, float* corrected) {
  const int members = call.num_experts / call.num_groups;
  float ranks[MAX_EXPERTS];
  for (int g = 0; g < call.num_groups; ++g) {
    float best = -__builtin_inff(), second = -__builtin_inff();
    for (int i = g * members; i < (g + 1) * members; ++i) {
      const float value = corrected[i];
      if (value > best) second = best, best = value;
      else if (value > second) second = value;
    }
    ranks[g] = best + second;
  }
  for (int g = 0; g < call.num_groups; ++g) {
    int ahead = 0;  // groups that come before this one; the earlier of equals does
    for (int other = 0; other < call.num_groups; ++other)
      ahead += ranks[other] > ranks[g] || (ranks[other] == ranks[g] && other < g);
    if (ahead < call.num_chosen_groups) continue;
    for (int i = g * members; i < (g + 1) * members; ++i) corrected[i] = -__builtin_inff();
  }
}

// Chooses one token's experts from its router logits, the earlier of equals first. Mutates: logits, to scores.
void choose(const Moe& call, float* logits, std::int32_t* experts, float* weights) {
  float corrected[MAX_EXPERTS];
  for (int e = 0; e < call.num_experts; e += LANES) {
    const std::size_t count = call.num_experts - e < LANES ? call.num_experts - e : LANES;
    const F32 scores = sigmoid(load_first(logits + e, count));
    store_first(logits + e, scores, count);
    store_first(corrected + e, scores + load_first(call.correction + e, count), count);
  }
  if (call.num_groups > 1) keep_best_groups(call, corrected);
  float sum = 0.0f;
  for (int x = 0; x < call.num_chosen; ++x) {
    int best = 0;
    for (int e = 1; e < call.num_experts; ++e)
      if (corrected[e] > corrected[best] || corrected[best] != corrected[best]) best = e;
    experts[x] = best;
    weights[x] = logits[best];
    sum = sum + weights[x];
    corrected[best] = -__builtin_inff();
  }
  for (int x = 0; x < call.num_chosen; ++x) {
    if (call.normalize_weights) weights[x] = weights[x] / (sum + 1e-20f);
    weights[x] = weights[x] * call.scale;
  }
}

// Sorts the entries by expert, tokens in order, and counts the tasks of each expert that has any.
void group_by_expert(const Moe& call, const Assignment& all, std::size_t num_tokens, std::size_t up_columns) {
  const std::size_t num_entries = num_tokens * call.num_chosen;
  const int num_experts = call.num_experts;
  for (int e = 0; e <= num_experts; ++e) all.starts[e] = 0;
  for (std::size_t i = 0; i < num_entries; ++i) ++all.starts[all.experts[i] + 1];
  for (int e = 0; e < num_experts; ++e) all.starts[e + 1] += all.starts[e];
  std::int32_t next[MAX_EXPERTS];
  for (int e = 0; e < num_experts; ++e) next[e] = all.starts[e];
  for (std::size_t i = 0; i < num_entries; ++i) {
    const std::int32_t place = next[all.experts[i]]++;
    all.places[i] = place;
    all.tokens[place] = static_cast<std::int32_t>(i / call.num_chosen);
  }
  all.up_tasks[0] = all.down_tasks[0] = 0;
  for (int e = 0; e < num_experts; ++e) {
    const bool has_any = all.starts[e + 1] > all.starts[e];
    all.up_tasks[e + 1] = all.up_tasks[e] + (has_any ? static_cast<std::int32_t>(up_columns) : 0);
    all.down_tasks[e + 1] = all.down_tasks[e] + (has_any ? static_cast<std::int32_t>(call.down.num_panels()) : 0);
  }
}

// The expert whose tasks a task is among.
int expert_of(const std::int32_t* first_tasks, int num_experts, std::int32_t task) {
  int low = 0, high = num_experts;  // the last e with first_tasks[e] <= task
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first_tasks[middle] <= task ? low : high) = middle;
  }
  return low;
}

Matrix matrix_of(Matrix matrix, std::size_t stride, int expert) {
  matrix.data += stride * expert;
  return matrix;
}

// Everything a call works on.
struct Work {
  Rows normed, latent, entry_inner, shared_inner;
  const void** entry_rows;  // [T X], the input row of each sorted entry
  float* logits;            // [T, E]
  float* results;           // [T X, Z], sorted
  float* shared_results;    // [T, D]
  Assignment all;
  std::size_t up_columns, shared_columns;  // tasks of one up product: 32 columns each
};

void route_tokens(Team& team, const Moe& call, const Work& work) {
  for_each(team, call.residual.num_tokens, 1, [&](std::size_t token) {
    choose(call, work.logits + token * call.num_experts, work.all.experts + token * call.num_chosen,
           work.all.weights + token * call.num_chosen);
  });
}

void gather_rows(const Moe& call, const Work& work) {
  group_by_expert(call, work.all, call.residual.num_tokens, work.up_columns);
  const Rows& input = call.latent_in ? work.latent : work.normed;
  const void* const* rows = input.of(call.up);
  for (std::size_t i = 0; i < call.residual.num_tokens * call.num_chosen; ++i) work.entry_rows[i] = rows[work.all.tokens[i]];
}

// Phase: the inner values of the routed experts, then of the shared one.
void activate(Team& team, const Moe& call, const Work& work) {
  const Assignment& all = work.all;
  const std::size_t routed = all.up_tasks[call.num_experts], count = routed + work.shared_columns;
  for_each(team, count, grain_of(team, count), [&](std::size_t task) {
    if (task >= routed) {
      activate_columns(Matrix{}, call.shared_up, work.normed.of(call.shared_up), call.residual.num_tokens, task - routed,
                       work.shared_inner, 0);
      return;
    }
    const int expert = expert_of(all.up_tasks, call.num_experts, static_cast<std::int32_t>(task));
    const std::size_t first = all.starts[expert], num_rows = all.starts[expert + 1] - first;
    activate_columns(Matrix{}, matrix_of(call.up, call.up_stride, expert), work.entry_rows + first, num_rows,
                     task - all.up_tasks[expert], work.entry_inner, first);
  });
}

// Phase: what each expert says to each of its tokens, and the shared one to all.
void answer(Team& team, const Moe& call, const Work& work) {
  const Assignment& all = work.all;
  const std::size_t routed = all.down_tasks[call.num_experts], count = routed + call.shared_down.num_panels();
  for_each(team, count, grain_of(team, count), [&](std::size_t task) {
    const bool is_shared = task >= routed;
    const int expert = is_shared ? 0 : expert_of(all.down_tasks, call.num_experts, static_cast<std::int32_t>(task));
    const Matrix matrix = is_shared ? call.shared_down : matrix_of(call.down, call.down_stride, expert);
    const Rows& inner = is_shared ? work.shared_inner : work.entry_inner;
    const std::size_t first = is_shared ? 0 : all.starts[expert];
    const std::size_t num_rows = is_shared ? call.residual.num_tokens : all.starts[expert + 1] - first;
    const std::size_t panel = task - (is_shared ? routed : all.down_tasks[expert]), stride = matrix.num_rows;
    float* results = (is_shared ? work.shared_results : work.results) + first * stride;
    multiply_panel(matrix, panel, inner.of(matrix) + first, num_rows, [&](const PanelOutputs& out) {
      float* to = results + out.first_row * stride + out.first_column;
      for (std::size_t m = 0; m < out.num_rows; ++m)
        store_first(to + m * stride, load(out.values + m * PANEL_ROWS), out.num_columns);
    });
  });
}

// What a token's experts say, weighted and summed in the order of its choice: `count` columns from `results` on.
F32 weighted_sum(const float* results, std::size_t width, const std::int32_t* places, const float* weights, int num_chosen,
                 std::size_t count) {
  F32 sum = splat(0.0f);
  for (int x = 0; x < num_chosen; ++x) sum = fma(splat(weights[x]), load_first(results + places[x] * width, count), sum);
  return sum;
}

// Phase: without a latent space, hidden + (routed + shared); with one, the routed sums, as rows for the way out of it.
void combine(Team& team, const Moe& call, const Work& work) {
  const Residual& residual = call.residual;
  const std::size_t width = call.down.num_rows;
  for_each(team, residual.num_tokens, 1, [&](std::size_t token) {
    for (std::size_t i = 0; i < width; i += LANES) {
      const std::size_t count = width - i < LANES ? width - i : LANES;
      const std::size_t choice = token * call.num_chosen;
      const F32 routed = weighted_sum(work.results + i, width, work.all.places + choice, work.all.weights + choice,
                                      call.num_chosen, count);
      if (call.latent_out) {
        store_first(work.latent.row(token) + i, routed, count);
        continue;
      }
      const F32 sum = routed + load_first(work.shared_results + token * width + i, count);
      store_any(residual.row(token), residual.element, i,
                load_any(residual.row(token), residual.element, i, count) + sum, count);
    }
    if (call.latent_out) work.latent.quantize(token);
  });
}

// Phase: hidden + (the way out of the latent space + shared).
void leave_latent(Team& team, const Moe& call, const Work& work) {
  const Residual& residual = call.residual;
  const Matrix& matrix = call.latent_out;
  for_each(team, matrix.num_panels(), grain_of(team, matrix.num_panels()), [&](std::size_t panel) {
    multiply_panel(matrix, panel, work.latent.of(matrix), residual.num_tokens, [&](const PanelOutputs& out) {
      for (std::size_t m = 0; m < out.num_rows; ++m) {
        void* row = residual.row(out.first_row + m);
        const float* shared = work.shared_results + (out.first_row + m) * residual.width + out.first_column;
        const F32 sum = load(out.values + m * PANEL_ROWS) + load_first(shared, out.num_columns);
        const F32 before = load_any(row, residual.element, out.first_column, out.num_columns);
        store_any(row, residual.element, out.first_column, before + sum, out.num_columns);
      }
    });
  });
}

Work take_work(Scratch& memory, const Moe& call) {
  const std::size_t num_tokens = call.residual.num_tokens, num_entries = num_tokens * call.num_chosen;
  const bool quantized_up = call.up.is_quantized(), quantized_shared = call.shared_up.is_quantized();
  const bool quantized_in = call.latent_in && call.latent_in.is_quantized();
  Work work;
  work.normed = take_rows(memory, num_tokens, call.residual.width, quantized_up || quantized_shared || quantized_in);
  if (call.latent_in)
    work.latent = take_rows(memory, num_tokens, call.up.num_columns, quantized_up || call.latent_out.is_quantized());
  work.entry_inner = take_rows(memory, num_entries, call.up.num_rows, call.down.is_quantized());
  work.shared_inner = take_rows(memory, num_tokens, call.shared_up.num_rows, call.shared_down.is_quantized());
  work.entry_rows = memory.take<const void*>(num_entries);
  work.logits = memory.take<float>(num_tokens * call.num_experts);
  work.results = memory.take<float>(num_entries * call.down.num_rows);
  work.shared_results = memory.take<float>(num_tokens * call.residual.width);
  const auto integers = [&](std::size_t count) { return memory.take<std::int32_t>(count); };
  work.all = {integers(num_entries), memory.take<float>(num_entries), integers(num_entries), integers(num_entries),
              integers(call.num_experts + 1), integers(call.num_experts + 1), integers(call.num_experts + 1)};
  work.up_columns = (call.up.num_rows + GROUP - 1) / GROUP;
  work.shared_columns = (call.shared_up.num_rows + GROUP - 1) / GROUP;
  return work;
}

}  // namespace

void moe(const Moe& call, int num_threads) {
  Scratch& memory = scratch();
  memory.reset();
  const Work work = take_work(memory, call);
  run_team(num_threads, [&](Team& team, int member) {
    prepare(team, call.residual, work.normed);
    team.barrier();
    write_product(team, work.normed, call.gate, work.logits);
    team.barrier();
    if (call.latent_in) {
      write_product(team, work.normed, call.latent_in, work.latent.floats);
      team.barrier();
    }
    route_tokens(team, call, work);
    team.barrier();
    if (call.latent_in) quantize_all(team, work.latent);
    if (member == 0) gather_rows(call, work);
    team.barrier();
    activate(team, call, work);
    team.barrier();
    answer(team, call, work);
    team.barrier();
    combine(team, call, work);
    if (call.latent_out) {
      team.barrier();
      leave_latent(team, call, work);
    }
  });
}

void choose_experts(const Moe& router, float* logits, std::size_t num_tokens, std::int32_t* experts, float* weights,
                    int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, num_tokens, grain_of(team, num_tokens), [&](std::size_t token) {
      const std::size_t choice = token * router.num_chosen;
      choose(router, logits + token * router.num_experts, experts + choice, weights + choice);
    });
  });
}

void sum_chosen(const float* results, const std::int32_t* places, const float* weights, std::size_t num_tokens,
                int num_chosen, std::size_t width, float* out, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, num_tokens, grain_of(team, num_tokens), [&](std::size_t token) {
      const std::size_t choice = token * num_chosen;
      for (std::size_t i = 0; i < width; i += LANES) {
        const std::size_t count = width - i < LANES ? width - i : LANES;
        const F32 sum = weighted_sum(results + i, width, places + choice, weights + choice, num_chosen, count);
        store_first(out + token * width + i, sum, count);
      }
    });
  });
}

void squares_gradient(const float* squares, const float* weights, std::size_t num_rows, std::size_t width, float* out,
                      float* of_weights, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, num_rows, grain_of(team, num_rows), [&](std::size_t row) {
      const F32 twice = splat(2.0f * weights[row]);
      F32 sum = splat(0.0f);
      for (std::size_t i = 0; i < width; i += LANES) {
        const std::size_t count = width - i < LANES ? width - i : LANES, at = row * width + i;
        const F32 square = load_first(squares + at, count), given = load_first(out + at, count);
        sum = fma(square, given, sum);
        store_first(out + at, square_root(square) * given * twice, count);
      }
      of_weights[row] = sum_of_lanes(sum);
    });
  });
}

}  // namespace freehold::FREEHOLD_FORM
