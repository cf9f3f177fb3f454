// The gradient of what lies between the projections of a Mamba-2 mixer: norm and gate, scan, convolution.
//
// Norm and gate, per token and channel: reads 12 bytes, writes 8; two silus and 20 operations. Convolution, per token and
// channel: reads 8 bytes, writes 4; 3 W fma and a silu. Memory bounds both. The scan is scan_gradient.cpp's.
//
// What is summed over tokens is summed in blocks of a fixed size, so the number of threads changes no bit.
#include "mamba2_gradient.h"

#include <algorithm>

#include "phases.h"
#include "scan_gradient.h"

namespace freehold::FREEHOLD_FORM {
namespace {

using std::size_t;

constexpr size_t BLOCK_TOKENS = 32;  // of the norm's sums

size_t num_blocks(const Sizes& sizes) { return (sizes.num_tokens + BLOCK_TOKENS - 1) / BLOCK_TOKENS; }

// e**x is not needed twice: silu(x) and its slope.
struct Gate {
  F32 value, slope;
};
Gate gate_of(F32 x) {
  const F32 s = sigmoid(x), one = splat(1.0f);
  return {x * s, s * fma(x, one - s, one)};
}

// ---- norm and gate ----

// One group of one token, with y and its gradient by heads: [H, T, P].
struct NormedGroup {
  size_t width, head_dim, head_pitch;
  const float *gate, *y, *out;
  float *gate_gradient, *y_gradient, *weight_gradient;

  // Calls `use(at, by_head)` for each sixteen channels: where they are in a row, and in heads side by side.
  template <typename Use>
  void for_each_strip(Use&& use) const {
    for (size_t head = 0; head < width / head_dim; ++head)
      for (size_t i = 0; i < head_dim; i += LANES) use(head * head_dim + i, head * head_pitch + i);
  }
};

NormedGroup group_of(const Mamba2Gradient& gradient, const Sizes& sizes, float* mixed, float* weights, size_t token,
                     size_t group) {
  const size_t head_dim = gradient.call.head_dim, width = sizes.inner / gradient.call.num_groups, first = group * width;
  const size_t by_head = sizes.num_tokens * first + token * head_dim, row = token * sizes.projected + first;
  return {width, head_dim, sizes.num_tokens * head_dim,
          gradient.call.projected + row, gradient.mixed + by_head, gradient.out + token * sizes.inner + first,
          gradient.projected + row, mixed + by_head, weights + first};
}

// unit = gated / root(mean of squares), out = unit * weight: with u the gradient of unit,
// gated's is (u - unit * mean(u * unit)) / root. Between the loops gated waits in the place of y's gradient.
template <typename Weight>
void differentiate_norm(const NormedGroup& group, const Weight* weight, float eps) {
  F32 squares = splat(0.0f), products = splat(0.0f);
  group.for_each_strip([&](size_t at, size_t by_head) {
    const F32 gated = load(group.y + by_head) * silu(load(group.gate + at));
    squares = fma(gated, gated, squares);
    products = fma(load(group.out + at) * load(weight + at), gated, products);
    store(group.y_gradient + by_head, gated);
  });
  const float width = static_cast<float>(group.width), mean = sum_of_lanes(squares) / width;
  const F32 scale = splat(1.0f) / square_root(splat(mean + eps));
  const F32 along = splat(sum_of_lanes(products) / width) * scale;
  group.for_each_strip([&](size_t at, size_t by_head) {
    const F32 unit = load(group.y_gradient + by_head) * scale, out = load(group.out + at);
    const F32 gated = (out * load(weight + at) - unit * along) * scale;
    const Gate gate = gate_of(load(group.gate + at));
    store(group.weight_gradient + at, fma(out, unit, load(group.weight_gradient + at)));
    store(group.y_gradient + by_head, gated * gate.value);
    store(group.gate_gradient + at, gated * load(group.y + by_head) * gate.slope);
  });
}

// Phase: the gradients of y into `mixed`, of the gate, and for each block of tokens a row of the weight's. A task is a
// group of a block.
void differentiate_norms(Team& team, const Mamba2Gradient& gradient, const Sizes& sizes, float* mixed, float* weight_rows) {
  const size_t num_groups = gradient.call.num_groups, width = sizes.inner / num_groups;
  for_each(team, num_blocks(sizes) * num_groups, 1, [&](size_t task) {
    const size_t block = task / num_groups, number = task % num_groups, start = block * BLOCK_TOKENS;
    float* weights = weight_rows + block * sizes.inner;
    std::fill_n(weights + number * width, width, 0.0f);
    for (size_t token = start; token < smaller(start + BLOCK_TOKENS, sizes.num_tokens); ++token) {
      const NormedGroup group = group_of(gradient, sizes, mixed, weights, token, number);
      if (gradient.call.weight_element == Element::float32)
        differentiate_norm(group, static_cast<const float*>(gradient.call.norm_weight) + number * width, gradient.call.norm_eps);
      else
        differentiate_norm(group, static_cast<const std::uint16_t*>(gradient.call.norm_weight) + number * width, gradient.call.norm_eps);
    }
  });
}

// Phase: the sums of the blocks' rows.
void sum_blocks(Team& team, const Sizes& sizes, const float* rows, float* sums) {
  for_each(team, sizes.inner / LANES, 1, [&](size_t strip) {
    F32 sum = splat(0.0f);
    for (size_t block = 0; block < num_blocks(sizes); ++block) sum += load(rows + block * sizes.inner + strip * LANES);
    store(sums + strip * LANES, sum);
  });
}

// ---- convolution ----

// Sixteen channels of all sequences.
struct Strip {
  int num_taps;
  F32 bias, weight[MAX_TAPS];
  F32 bias_gradient, weight_gradient[MAX_TAPS];
};

// Row r of the sequence, and the gradient of what token r makes of its rows, are at r % MAX_TAPS. Token l meets the rows
// l - W + 1 to l; a row's gradient is whole when the last token that meets it has been.
void differentiate_sequence(const Mamba2Gradient& gradient, const Sizes& sizes, size_t start, size_t stop, size_t column,
                            const float* out, size_t pitch, Strip& strip) {
  const Mamba2& call = gradient.call;
  const int last = strip.num_taps - 1;
  F32 rows[MAX_TAPS], sums[MAX_TAPS];
  for (int i = 0; i < MAX_TAPS; ++i) rows[i] = sums[i] = splat(0.0f);
  for (size_t token = start; token < stop + last; ++token) {
    const size_t at = token - start + MAX_TAPS;  // so that nothing before the first row is below zero
    sums[at % MAX_TAPS] = splat(0.0f);
    if (token < stop) {
      rows[at % MAX_TAPS] = rounded(load(call.projected + token * sizes.projected + column), call.tail_element);
      F32 sum = strip.bias;
      for (int tap = 0; tap <= last; ++tap) sum = fma(rows[(at + tap - last) % MAX_TAPS], strip.weight[tap], sum);
      const F32 of_sum = sums[at % MAX_TAPS] = load(out + token * pitch) * gate_of(sum).slope;
      strip.bias_gradient += of_sum;
      for (int tap = 0; tap <= last; ++tap)
        strip.weight_gradient[tap] = fma(of_sum, rows[(at + tap - last) % MAX_TAPS], strip.weight_gradient[tap]);
    }
    if (token < start + last) continue;
    F32 of_row = splat(0.0f);
    for (int tap = 0; tap <= last; ++tap) of_row = fma(sums[(at - tap) % MAX_TAPS], strip.weight[tap], of_row);
    store(gradient.projected + (token - last) * sizes.projected + column, of_row);
  }
}

void store_strip(const Mamba2Gradient& gradient, size_t channel, const Strip& strip) {
  store(gradient.conv_bias + channel, strip.bias_gradient);
  for (int tap = 0; tap < strip.num_taps; ++tap) {
    float lanes[LANES];
    store(lanes, strip.weight_gradient[tap]);
    for (int i = 0; i < LANES; ++i) gradient.conv_weight[(channel + i) * strip.num_taps + tap] = lanes[i];
  }
}

// Phase: from the gradients of x, b and c in `mixed` those of the rows and of the convolution's weights. A task is some
// channels of all sequences.
void differentiate_convolution(Team& team, const Mamba2Gradient& gradient, const Sizes& sizes, const float* mixed) {
  const Mamba2& call = gradient.call;
  for_each(team, num_channel_tasks(sizes), 1, [&](size_t task) {
    const Channels channels = channels_of(call, sizes, task);
    for (int number = 0; number < channels.num_strips; ++number) {
      const size_t channel = channels.first + number * LANES;
      Strip strip;
      strip.num_taps = call.conv_kernel;
      strip.bias = load(channels.bias + number * LANES);
      strip.bias_gradient = splat(0.0f);
      for (int tap = 0; tap < strip.num_taps; ++tap) {
        strip.weight[tap] = load(channels.weight[tap] + number * LANES);
        strip.weight_gradient[tap] = splat(0.0f);
      }
      for (int sequence = 0; sequence < call.batch.num_sequences; ++sequence)
        differentiate_sequence(gradient, sizes, call.batch.starts[sequence], call.batch.starts[sequence + 1],
                               sizes.inner + channel, mixed + channels.at[number], channels.pitch[number], strip);
      store_strip(gradient, channel, strip);
    }
  });
}

// The call as it was, into other memory, its sequences in slots of their own.
Mamba2 repeated(Scratch& memory, const Mamba2& call, const Sizes& sizes) {
  Mamba2 again = call;
  const size_t num_sequences = call.batch.num_sequences;
  std::int32_t* slots = memory.take<std::int32_t>(num_sequences);
  for (size_t sequence = 0; sequence < num_sequences; ++sequence) slots[sequence] = static_cast<std::int32_t>(sequence);
  const size_t num_tail = num_sequences * (call.conv_kernel - 1) * sizes.channels;
  float* tail = memory.take<float>(num_tail);
  std::fill_n(tail, num_tail, 0.0f);  // zeros in either element
  again.batch.slots = slots;
  again.conv_tail = tail;
  again.mixed = memory.take<float>(sizes.num_tokens * sizes.channels);
  return again;
}

}  // namespace

void mamba2_gradient(const Mamba2Gradient& gradient, int num_threads) {
  Scratch& memory = scratch();
  memory.reset();
  const Sizes sizes = sizes_of(gradient.call);
  const Mamba2 call = repeated(memory, gradient.call, sizes);
  float* weight_rows = memory.take<float>(num_blocks(sizes) * sizes.inner);
  ScanGradient scan = take_scan_gradient(memory, call, num_threads);
  scan.mixed = call.mixed;
  scan.gradients = memory.take<float>(sizes.num_tokens * sizes.channels);
  scan.projected = gradient.projected;
  run_team(num_threads, [&](Team& team, int member) {
    convolve(team, call);
    team.barrier();
    differentiate_norms(team, gradient, sizes, scan.gradients, weight_rows);
    team.barrier();
    sum_blocks(team, sizes, weight_rows, gradient.norm_weight);
    team.barrier();
    measure_steps(team, scan);
    team.barrier();
    pass_states(team, member, scan);
    team.barrier();
    differentiate_chunks(team, member, scan);
    team.barrier();
    sum_chunks(team, scan, gradient.a_log, gradient.d, gradient.dt_bias);
    team.barrier();
    differentiate_convolution(team, gradient, sizes, scan.gradients);
  });
}

}  // namespace freehold::FREEHOLD_FORM
