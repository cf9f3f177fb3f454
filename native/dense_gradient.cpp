// What training computes beside products. All of it passes over memory once: a few operations (and an exponential) for
// each element that is read, and the bytes are the bound where they come from beyond the caches.
//
// The norm's weight gets the sum over tokens in runs of RUN_TOKENS, which are then added in order: any number of threads
// gives the same bits.
#include "dense_gradient.h"

#include <cmath>

#include "mlp.h"
#include "phases.h"

namespace freehold::FREEHOLD_FORM {
namespace {

constexpr std::size_t RUN_TOKENS = 64, RUN_ELEMENTS = 4096, SUM_WIDTH = 1024;

// dx_i = s w_i g_i - x_i s^3 mean(w g x), with s = 1 / sqrt(mean(x^2) + eps); adds g x s to the weight's sum.
void norm_gradient_of_row(const NormGradient& call, std::size_t token, float* weight_sum) {
  const Residual& from = call.from;
  const std::size_t width = from.width;
  const void* row = from.row(token);
  const float* out = call.out + token * width;
  F32 squares = splat(0.0f), products = splat(0.0f);
  const auto each = [&](auto&& use) {
    for (std::size_t i = 0; i < width; i += LANES) {
      const std::size_t count = width - i < LANES ? width - i : LANES;
      use(i, count, load_any(row, from.element, i, count), load_any(from.norm.weight, from.norm.element, i, count),
          load_first(out + i, count));
    }
  };
  each([&](std::size_t, std::size_t, F32 x, F32 w, F32 g) {
    squares = fma(x, x, squares);
    products = fma(w * g, x, products);
  });
  const float mean = sum_of_lanes(squares) / static_cast<float>(width) + from.norm.eps, scale = 1.0f / __builtin_sqrtf(mean);
  const F32 s = splat(scale), back = splat(scale * scale * scale * (sum_of_lanes(products) / static_cast<float>(width)));
  Residual to = from;
  to.hidden = call.hidden;
  each([&](std::size_t i, std::size_t count, F32 x, F32 w, F32 g) {
    if (call.hidden) store_any(to.row(token), to.element, i, s * w * g - x * back, count);
    if (weight_sum) store_first(weight_sum + i, fma(g * s, x, load_first(weight_sum + i, count)), count);
  });
}

// Runs of elements, each for whoever asks first: `use(first, count)` with at most LANES elements.
template <typename Use>
void for_each_lanes(std::size_t count, int num_threads, Use&& use) {
  const std::size_t num_runs = (count + RUN_ELEMENTS - 1) / RUN_ELEMENTS;
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, num_runs, 1, [&](std::size_t run) {
      const std::size_t stop = (run + 1) * RUN_ELEMENTS < count ? (run + 1) * RUN_ELEMENTS : count;
      for (std::size_t i = run * RUN_ELEMENTS; i < stop; i += LANES) use(i, stop - i < LANES ? stop - i : LANES);
    });
  });
}

float cross_entropy_of_row(float* logits, std::size_t width, std::int64_t label) {
  F32 most = splat(-__builtin_inff());
  const auto each = [&](float absent, auto&& use) {
    std::size_t i = 0;
    for (; i + LANES <= width; i += LANES) use(i, std::size_t{LANES}, load(logits + i));
    if (i == width) return;
    float last[LANES];
    for (int lane = 0; lane < LANES; ++lane) last[lane] = i + lane < width ? logits[i + lane] : absent;
    use(i, width - i, load(last));
  };
  each(-__builtin_inff(), [&](std::size_t, std::size_t, F32 x) { most = max(most, x); });
  const float largest = max_of_lanes(most), of_label = logits[label];
  F32 sums = splat(0.0f);
  double sum = 0.0;  // of runs: a whole vocabulary summed in float32 loses what its many small terms come to
  each(-__builtin_inff(), [&](std::size_t i, std::size_t count, F32 x) {
    const F32 weight = exp(x - splat(largest));
    sums += weight;
    store_first(logits + i, weight, count);
    if ((i + LANES) % SUM_WIDTH) return;
    sum += sum_of_lanes(sums);
    sums = splat(0.0f);
  });
  sum += sum_of_lanes(sums);
  const F32 inverse = splat(static_cast<float>(1.0 / sum));
  each(0.0f, [&](std::size_t i, std::size_t count, F32 weight) { store_first(logits + i, weight * inverse, count); });
  logits[label] -= 1.0f;
  return static_cast<float>(std::log(sum) + largest - of_label);
}

}  // namespace

void norm_gradient(const NormGradient& call, int num_threads) {
  const std::size_t num_tokens = call.from.num_tokens, width = call.from.width;
  const std::size_t num_runs = (num_tokens + RUN_TOKENS - 1) / RUN_TOKENS;
  Scratch& memory = scratch();
  memory.reset();
  float* sums = call.weight ? memory.take<float>(num_runs * width) : nullptr;
  run_team(num_threads, [&](Team& team, int member) {
    for_each(team, num_runs, 1, [&](std::size_t run) {
      float* sum = sums ? sums + run * width : nullptr;
      for (std::size_t i = 0; sum && i < width; ++i) sum[i] = 0.0f;
      for (std::size_t token = run * RUN_TOKENS; token < (run + 1) * RUN_TOKENS && token < num_tokens; ++token)
        norm_gradient_of_row(call, token, sum);
    });
    team.barrier();
    if (member != 0 || !call.weight) return;
    for (std::size_t i = 0; i < width; ++i) {
      float sum = 0.0f;
      for (std::size_t run = 0; run < num_runs; ++run) sum += sums[run * width + i];
      call.weight[i] = sum;
    }
  });
}

void activate(const Activation& call, float* out, int num_threads) {
  for_each_lanes(call.count, num_threads, [&](std::size_t i, std::size_t count) {
    const F32 up = load_first(call.up + i, count);
    store_first(out + i, call.gate ? silu(load_first(call.gate + i, count)) * up : squared_relu(up), count);
  });
}

void activation_gradient(const Activation& call, const float* out, float* gate_gradient, float* up_gradient, int num_threads) {
  for_each_lanes(call.count, num_threads, [&](std::size_t i, std::size_t count) {
    const F32 up = load_first(call.up + i, count), given = load_first(out + i, count);
    if (!call.gate) {
      const F32 positive = max(splat(0.0f), up);
      return store_first(up_gradient + i, (positive + positive) * given, count);
    }
    const F32 gate = load_first(call.gate + i, count), share = sigmoid(gate), of_silu = gate * share;
    store_first(up_gradient + i, of_silu * given, count);
    store_first(gate_gradient + i, fma(of_silu, splat(1.0f) - share, share) * up * given, count);
  });
}

void cross_entropy(const CrossEntropy& call, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, call.num_rows, 1, [&](std::size_t row) {
      call.losses[row] = cross_entropy_of_row(call.logits + row * call.width, call.width, call.labels[row]);
    });
  });
}

}  // namespace freehold::FREEHOLD_FORM
