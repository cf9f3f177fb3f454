// The convolution, the scan and the gated norm of Mamba-2, one phase each.
//
// Convolution, per token and channel: reads 4 bytes, writes 4; W fma and a silu of 30 operations. Memory bounds it.
// Scan, per token and element of the state: 2 fma and a product. For a prompt the state moves between registers and L1
// once for TOGETHER tokens, and the multipliers bound it. For a single token it is read and written once, 8 bytes for 3
// operations, and the cache or memory that holds it bounds it.
// Norm, per token and channel: reads 8 bytes, writes 4; a silu and 4 operations. Memory bounds it.
#include "mamba2_channels.h"

namespace freehold::FREEHOLD_FORM {
namespace {

using std::size_t;

constexpr int ROWS_AHEAD = 4;       // rows of `projected` are pages apart, which the hardware does not foresee
constexpr int TOGETHER = 2;         // tokens of a prompt that pass over the state at once: as many as 16 registers hold
constexpr int ABREAST = 4;          // strips of the state that a single token takes at once, to read it in order
constexpr int TOKENS_PER_TASK = 8;  // of the norm

// ---- convolution ----

// The rows of a sequence, its tail first, go around in `rows`: row r is at r % MAX_TAPS, and token l meets the rows
// l to l + W - 1. The rows after the last token's first are the new tail, however few tokens there are.
template <typename Tail>
void convolve_sequence(const Mamba2& call, const Sizes& sizes, const Channels& channels, int sequence) {
  float rows[MAX_TAPS][MAX_STRIPS * LANES];
  const int num_taps = call.conv_kernel, num_strips = channels.num_strips;
  const size_t start = call.batch.starts[sequence], length = call.batch.starts[sequence + 1] - start;
  const size_t slot = call.batch.slots[sequence];
  Tail* tail = static_cast<Tail*>(call.conv_tail) + slot * (num_taps - 1) * sizes.channels + channels.first;
  for (int row = 0; row < num_taps - 1; ++row)
    for (int i = 0; i < num_strips * LANES; i += LANES) store(rows[row] + i, load(tail + row * sizes.channels + i));

  const float* from = call.projected + start * sizes.projected + sizes.inner + channels.first;
  for (size_t token = 0; token < length; ++token, from += sizes.projected) {
    float* newest = rows[(token + num_taps - 1) % MAX_TAPS];
    for (int strip = 0; strip < num_strips; ++strip) {
      const int i = strip * LANES;
      prefetch(from + ROWS_AHEAD * sizes.projected + i);
      store(newest + i, rounded(load(from + i), call.tail_element));
      F32 sum = load(channels.bias + i);
      for (int tap = 0; tap < num_taps; ++tap)
        sum = fma(load(rows[(token + tap) % MAX_TAPS] + i), load(channels.weight[tap] + i), sum);
      store(call.mixed + channels.at[strip] + (start + token) * channels.pitch[strip], silu(sum));
    }
  }
  for (int row = 0; row < num_taps - 1; ++row)
    for (int i = 0; i < num_strips * LANES; i += LANES)
      store(tail + row * sizes.channels + i, load(rows[(length + row) % MAX_TAPS] + i));
}

// ---- scan ----

// Up to sixteen tokens of one head. y takes the place of x.
struct Block {
  int num_tokens;
  size_t head_dim, state_size;  // the pitches of x and of b and c
  float d;
  float step[LANES], decay[LANES];  // dt, exp(dt A)
  float* x;
  const float *b, *c;
};

void load_steps(const Mamba2& call, const Sizes& sizes, int head, size_t token, Block& block) {
  float dt[LANES] = {};
  const float* from = call.projected + token * sizes.projected + sizes.inner + sizes.channels + head;
  for (int i = 0; i < block.num_tokens; ++i) dt[i] = from[i * sizes.projected];
  const F32 step = clamped(softplus(load(dt) + splat(call.dt_bias[head])), call.min_step, call.max_step);
  store(block.step, step);
  store(block.decay, exp(step * (splat(0.0f) - exp(splat(call.a_log[head])))));
}

// Takes `tokens` tokens of the block, from `first` on, over `strips` * 16 lanes of the state, x and y, from `lane` on.
// The inner loop of the scan; what a token and a lane go through is the same for any grouping of either.
template <int tokens, int strips>
inline void advance(const Block& block, int first, size_t lane, float* state) {
  const size_t width = block.head_dim, num_rows = block.state_size;
  float* x = block.x + first * width + lane;
  const float* b = block.b + first * num_rows;
  const float* c = block.c + first * num_rows;
  F32 decay[tokens], xdt[tokens][strips], y[tokens][strips];
  for (int t = 0; t < tokens; ++t) {
    decay[t] = splat(block.decay[first + t]);
    for (int s = 0; s < strips; ++s) {
      const F32 value = load(x + t * width + s * LANES);
      xdt[t][s] = value * splat(block.step[first + t]);
      y[t][s] = value * splat(block.d);
    }
  }
  state += lane;
  for (size_t n = 0; n < num_rows; ++n, state += width)
    for (int s = 0; s < strips; ++s) {
      F32 value = load(state + s * LANES);
      for (int t = 0; t < tokens; ++t) {
        value = fma(xdt[t][s], splat(b[t * num_rows + n]), decay[t] * value);
        y[t][s] = fma(value, splat(c[t * num_rows + n]), y[t][s]);
      }
      store(state + s * LANES, value);
    }
  for (int t = 0; t < tokens; ++t)
    for (int s = 0; s < strips; ++s) store(x + t * width + s * LANES, y[t][s]);
}

void scan_one(const Block& block, float* state) {
  size_t lane = 0;
  for (; lane + ABREAST * LANES <= block.head_dim; lane += ABREAST * LANES) advance<1, ABREAST>(block, 0, lane, state);
  for (; lane < block.head_dim; lane += LANES) advance<1, 1>(block, 0, lane, state);
}

// Strip by strip, so that a strip of the state stays in L1 while all tokens of the block pass.
void scan_many(const Block& block, float* state) {
  for (size_t lane = 0; lane < block.head_dim; lane += LANES) {
    int token = 0;
    for (; token + TOGETHER <= block.num_tokens; token += TOGETHER) advance<TOGETHER, 1>(block, token, lane, state);
    for (; token < block.num_tokens; ++token) advance<1, 1>(block, token, lane, state);
  }
}

void scan_head(const Mamba2& call, const Sizes& sizes, int sequence, int head) {
  const size_t head_dim = call.head_dim, state_size = call.state_size, num_groups = call.num_groups;
  const size_t group = head / (call.num_heads / call.num_groups);
  const size_t slot = call.batch.slots[sequence];
  float* state = call.ssm + (slot * call.num_heads + head) * state_size * head_dim;
  const float* b = call.mixed + sizes.num_tokens * (sizes.inner + group * state_size);
  const float* c = b + sizes.num_tokens * num_groups * state_size;
  float* x = call.mixed + sizes.num_tokens * head * head_dim;
  const size_t stop = call.batch.starts[sequence + 1];
  for (size_t token = call.batch.starts[sequence]; token < stop; token += LANES) {
    Block block;
    block.num_tokens = static_cast<int>(smaller(LANES, stop - token));
    block.head_dim = head_dim;
    block.state_size = state_size;
    block.d = call.d[head];
    block.x = x + token * head_dim;
    block.b = b + token * state_size;
    block.c = c + token * state_size;
    load_steps(call, sizes, head, token, block);
    block.num_tokens == 1 ? scan_one(block, state) : scan_many(block, state);
  }
}

// ---- gate and norm ----

// One group of one token: y times silu(gate) into `out`, and then the norm in place.
template <typename Weight>
void normalize_group(const Mamba2& call, const Sizes& sizes, size_t token, size_t group) {
  const size_t head_dim = call.head_dim, width = sizes.inner / call.num_groups, first = group * width;
  const float* gate = call.projected + token * sizes.projected + first;
  const float* y = call.mixed + sizes.num_tokens * first + token * head_dim;
  const Weight* weight = static_cast<const Weight*>(call.norm_weight) + first;
  float* out = call.out + token * sizes.inner + first;
  F32 squares = splat(0.0f);
  for (size_t head = 0; head < width; head += head_dim)
    for (size_t i = 0; i < head_dim; i += LANES) {
      const F32 gated = load(y + sizes.num_tokens * head + i) * silu(load(gate + head + i));
      squares = fma(gated, gated, squares);
      prefetch(y + sizes.num_tokens * head + head_dim + i);  // of the next token, as in the convolution
      prefetch(gate + sizes.projected + head + i);
      store(out + head + i, gated);
    }
  const float mean = sum_of_lanes(squares) / static_cast<float>(width);
  const F32 scale = splat(1.0f) / square_root(splat(mean + call.norm_eps));
  for (size_t i = 0; i < width; i += LANES) store(out + i, load(out + i) * scale * load(weight + i));
}

}  // namespace

void convolve(Team& team, const Mamba2& call) {
  const Sizes sizes = sizes_of(call);
  const size_t num_tasks = num_channel_tasks(sizes);
  for (size_t task = team.claim(); task < num_tasks; task = team.claim()) {
    const Channels channels = channels_of(call, sizes, task);
    for (int sequence = 0; sequence < call.batch.num_sequences; ++sequence)
      if (call.tail_element == Element::float32)
        convolve_sequence<float>(call, sizes, channels, sequence);
      else
        convolve_sequence<std::uint16_t>(call, sizes, channels, sequence);
  }
}

void scan(Team& team, const Mamba2& call) {
  const Sizes sizes = sizes_of(call);
  const size_t num_tasks = static_cast<size_t>(call.batch.num_sequences) * call.num_heads;
  for (size_t task = team.claim(); task < num_tasks; task = team.claim())
    scan_head(call, sizes, static_cast<int>(task / call.num_heads), static_cast<int>(task % call.num_heads));
}

void gate_and_normalize(Team& team, const Mamba2& call) {
  const Sizes sizes = sizes_of(call);
  const size_t num_groups = call.num_groups;
  const size_t num_tasks = (sizes.num_tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK * num_groups;
  for (size_t task = team.claim(); task < num_tasks; task = team.claim()) {
    const size_t group = task % num_groups, start = task / num_groups * TOKENS_PER_TASK;
    for (size_t token = start; token < smaller(start + TOKENS_PER_TASK, sizes.num_tokens); ++token)
      if (call.weight_element == Element::float32)
        normalize_group<float>(call, sizes, token, group);
      else
        normalize_group<std::uint16_t>(call, sizes, token, group);
  }
}

}  // namespace freehold::FREEHOLD_FORM
