// For outputs l and sources s of a chunk, s <= l, with a_l the sum of dt A up to token l (all per head):
//
//   y_l       = sum over s of (c_l b_s) e^(a_l - a_s) dt_s x_s + e^(a_l) c_l S + D x_l         S before the chunk
//   S after   = e^(a_last) S + sum over s of e^(a_last - a_s) dt_s b_s x_s
//
// Each gradient is that of these two lines. The one of a decay dt_t A is the sum over all that passes token t: pairs with
// s < t <= l, the state before to l >= t, s < t to the state after, and the state from end to end. Pairs are summed as
// they are and not as differences of running sums, which would cancel.
//
// Operations, per token and head: four products with a state and the two that make states, 2 N P each, and two with the
// chunk's own tokens, CHUNK P each; per group four of CHUNK N. Bytes: two states a chunk, written and read once. The
// multipliers are the bound.
#include "scan_gradient.h"

#include <algorithm>
#include <utility>

#include "phases.h"
#include "products.h"

namespace freehold::FREEHOLD_FORM {
namespace {

using std::size_t;

// One member's memory.
struct Room {
  Panels b, c;                   // [N, chunk] each: rows of the chunk, columns n
  Panels c_columns;              // [chunk, N]
  Panels y_rows, y_columns;      // gradients of y: [P, chunk], [chunk, P]
  Panels state, state_columns;   // [P, N], [N, P]
  float *pairs, *pair_gradients; // [s, l], c_l b_s and its gradient, which all heads of the group add to
  float *weights, *products;     // [s, l], pairs with decays; sums over P of x_s and the gradient of y_l
  float *scaled, *sources, *ends;  // [chunk, P]
  float* outputs;                // [chunk, N]
};

size_t room_size(const Mamba2& call) {
  const size_t n = call.state_size, p = call.head_dim;
  return 4 * CHUNK * n + 4 * CHUNK * CHUNK + 5 * CHUNK * p + 2 * n * p;
}

Room room_of(const ScanGradient& scan, int member) {
  const size_t n = scan.call->state_size, p = scan.call->head_dim;
  float* next = scan.members + member * scan.member_size;
  const auto take = [&](size_t count) { return std::exchange(next, next + count); };
  const auto panels = [&](size_t depth, size_t columns) { return Panels{take(depth * columns), depth}; };
  Room room;
  room.b = panels(CHUNK, n);
  room.c = panels(CHUNK, n);
  room.c_columns = panels(n, CHUNK);
  room.y_rows = panels(CHUNK, p);
  room.y_columns = panels(p, CHUNK);
  room.state = panels(n, p);
  room.state_columns = panels(p, n);
  for (float** square : {&room.pairs, &room.pair_gradients, &room.weights, &room.products}) *square = take(CHUNK * CHUNK);
  for (float** rows : {&room.scaled, &room.sources, &room.ends}) *rows = take(CHUNK * p);
  room.outputs = take(CHUNK * n);
  return room;
}

// A = -e**a_log, as the scan has it.
float rate_of(const Mamba2& call, size_t head) {
  float lanes[LANES];
  store(lanes, splat(0.0f) - exp(splat(call.a_log[head])));
  return lanes[0];
}

// dt before softplus, of tokens of a head; zeros behind them.
void load_raw_steps(const Place& place, float* raw) {
  const Mamba2& call = *place.scan.call;
  const Sizes& sizes = place.scan.sizes;
  const float* from = call.projected + place.chunk.start * sizes.projected + sizes.inner + sizes.channels + place.head;
  for (size_t s = 0; s < CHUNK; ++s)
    raw[s] = s < place.chunk.length ? from[s * sizes.projected] + call.dt_bias[place.head] : 0.0f;
}

// e**number for a few numbers.
void exponentials(float* numbers, size_t count) {
  for (size_t i = 0; i < count; i += LANES) store(numbers + i, exp(load(numbers + i)));
}

float dot(const float* a, const float* b, size_t width) {
  F32 sum = splat(0.0f);
  for (size_t i = 0; i < width; i += LANES) sum = fma(load(a + i), load(b + i), sum);
  return sum_of_lanes(sum);
}

// Rows times one factor each.
void scale_rows(const float* from, const float* factors, size_t num_rows, size_t width, float* to) {
  for (size_t m = 0; m < num_rows; ++m)
    for (size_t i = 0; i < width; i += LANES) store(to + m * width + i, load(from + m * width + i) * splat(factors[m]));
}

// e**(a_l), and e**(a_last - a_s); zeros behind them.
struct Decays {
  float from_start[CHUNK] = {}, to_end[CHUNK] = {}, whole;
};

Decays decays_of(const Place& place) {
  Decays decays;
  const float* logs = place.logs();
  const size_t length = place.chunk.length, last = length - 1;
  for (size_t l = 0; l < length; ++l) {
    decays.from_start[l] = logs[l];
    decays.to_end[l] = logs[last] - logs[l];
  }
  exponentials(decays.from_start, CHUNK);
  exponentials(decays.to_end, CHUNK);
  decays.whole = decays.from_start[last];
  return decays;
}

// to = whole * before + the sum over the chunk's tokens of factor times vector [N] times row [P].
void pass_chunk(const Place& place, const Room& room, const float* vectors, const float* rows, const float* factors,
                float whole, const float* before, float* to) {
  const size_t n = place.state_size(), p = place.head_dim(), length = place.chunk.length;
  scale_rows(rows, factors, length, p, room.scaled);
  pack_rows(room.scaled, length, p, room.y_rows);
  multiply_all({vectors, 1, n}, n, room.y_rows, p, 0, length, {to, p, before, whole});
}

void pass_forward(const ScanGradient& scan, const Room& room, int sequence, size_t head) {
  const size_t first = scan.first_chunks[sequence];
  for (size_t chunk = first; chunk + 1 < scan.first_chunks[sequence + 1]; ++chunk) {
    const Place place = place_of(scan, chunk, head);
    Decays decays = decays_of(place);
    for (size_t s = 0; s < place.chunk.length; ++s) decays.to_end[s] *= place.steps()[s];
    pass_chunk(place, room, scan.mixed + place.b_at(), scan.mixed + place.x_at(), decays.to_end, decays.whole,
               chunk == first ? nullptr : scan.states + place.state_at(chunk), scan.states + place.state_at(chunk + 1));
  }
}

void pass_backward(const ScanGradient& scan, const Room& room, int sequence, size_t head) {
  const size_t last = scan.first_chunks[sequence + 1] - 1;
  for (size_t chunk = last; chunk > scan.first_chunks[sequence]; --chunk) {
    const Place place = place_of(scan, chunk, head);
    const Decays decays = decays_of(place);
    float* gradients = scan.state_gradients;
    pass_chunk(place, room, scan.mixed + place.c_at(), scan.gradients + place.x_at(), decays.from_start, decays.whole,
               chunk == last ? nullptr : gradients + place.state_at(chunk), gradients + place.state_at(chunk - 1));
  }
}

// ---- a group of a chunk ----

void begin_group(const Place& place, const Room& room) {
  const size_t n = place.state_size(), length = place.chunk.length;
  const float *b = place.scan.mixed + place.b_at(), *c = place.scan.mixed + place.c_at();
  pack_rows(b, length, n, room.b);
  pack_rows(c, length, n, room.c);
  pack_columns(c, length, n, room.c_columns);
  for (size_t l = 0; l < length; l += LANES)
    multiply_columns({b, n, 1}, smaller(l + LANES, length), room.c_columns.at(l / LANES), n, {room.pairs + l, CHUNK});
  std::fill_n(room.pair_gradients, CHUNK * CHUNK, 0.0f);
  std::fill_n(place.scan.gradients + place.b_at(), length * n, 0.0f);
  std::fill_n(place.scan.gradients + place.c_at(), length * n, 0.0f);
}

// The gradients of b and c through the pairs of all heads.
void end_group(const Place& place, const Room& room) {
  const size_t n = place.state_size(), length = place.chunk.length;
  const Factor by_source{room.pair_gradients, CHUNK, 1}, by_output{room.pair_gradients, 1, CHUNK};
  const Target b = onto(place.scan.gradients + place.b_at(), n), c = onto(place.scan.gradients + place.c_at(), n);
  for (size_t first = 0; first < length; first += LANES) {
    const size_t stop = smaller(first + LANES, length), count = stop - first;
    multiply_all(by_source.from(first, 0), count, room.c, n, first, length, b.from(first, 0));
    multiply_all(by_output.from(first, 0), count, room.b, n, 0, stop, c.from(first, 0));
  }
}

// ---- a head of a chunk ----

// Gradients of the logarithms of a head's decays, dt A.
struct DecayGradients {
  float values[CHUNK] = {};
};
const float COUNT_UP[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Pairs with their decays into `weights`, their gradients onto `pair_gradients`, and what passes each token.
void weigh_pairs(const Place& place, const Room& room, DecayGradients& found) {
  const size_t length = place.chunk.length;
  const float* steps = place.steps();
  float logs[CHUNK], passing[CHUNK] = {};
  std::fill(std::copy_n(place.logs(), length, logs), logs + CHUNK, -__builtin_inff());
  for (size_t s = 0; s < length; ++s) {
    const size_t first = s / LANES * LANES;
    const F32 step = splat(steps[s]), zero = splat(0.0f);
    const auto from_s = [&](size_t l, F32 value) {
      return where_less(load(COUNT_UP), splat(static_cast<float>(s) - static_cast<float>(l)), zero, value);
    };
    F32 passes = from_s(first, load(passing + first));
    for (size_t l = first + LANES; l < length; l += LANES) passes += load(passing + l);
    found.values[s] = sum_of_lanes(passes);
    for (size_t l = first; l < length; l += LANES) {
      const size_t at = s * CHUNK + l;
      F32 decay = exp(load(logs + l) - splat(logs[s]));
      if (l == first) decay = from_s(l, decay);
      const F32 weight = load(room.pairs + at) * decay, product = load(room.products + at) * step;
      store(room.weights + at, weight);
      store(room.pair_gradients + at, fma(product, decay, load(room.pair_gradients + at)));
      store(passing + l, fma(product, weight, load(passing + l)));
    }
  }
}

// Through the tokens of the chunk itself: what each source gives, without its dt, into `sources`.
void differentiate_pairs(const Place& place, const Room& room, DecayGradients& found) {
  const size_t p = place.head_dim(), length = place.chunk.length;
  const float *x = place.scan.mixed + place.x_at(), *y = place.scan.gradients + place.x_at();
  pack_rows(y, length, p, room.y_rows);
  pack_columns(y, length, p, room.y_columns);
  for (size_t l = 0; l < length; l += LANES)
    multiply_columns({x, p, 1}, smaller(l + LANES, length), room.y_columns.at(l / LANES), p, {room.products + l, CHUNK});
  weigh_pairs(place, room, found);
  const Factor weights{room.weights, CHUNK, 1};
  for (size_t first = 0; first < length; first += LANES)
    multiply_all(weights.from(first, 0), smaller(LANES, length - first), room.y_rows, p, first, length,
                 Target{room.sources, p}.from(first, 0));
}

// Through the state before the chunk: onto the gradient of c, and of the decays up to each output.
void differentiate_state_before(const Place& place, const Room& room, const Decays& decays, DecayGradients& found) {
  const size_t n = place.state_size(), p = place.head_dim(), length = place.chunk.length;
  const ScanGradient& scan = place.scan;
  scale_rows(scan.gradients + place.x_at(), decays.from_start, length, p, room.scaled);
  pack_columns(scan.states + place.state_at(place.number), n, p, room.state_columns);
  multiply_all({room.scaled, p, 1}, length, room.state_columns, n, 0, p, {room.outputs, n});
  float passing = 0.0f;
  for (size_t l = length; l-- > 0;) {
    const float *part = room.outputs + l * n, *c = scan.mixed + place.c_at() + l * n;
    float* gradient = scan.gradients + place.c_at() + l * n;
    for (size_t i = 0; i < n; i += LANES) store(gradient + i, load(gradient + i) + load(part + i));
    passing += dot(part, c, n);
    found.values[l] += passing;
  }
}

// Through the state after the chunk: onto the gradients of b, of the sources, and of the decays after each source.
void differentiate_state_after(const Place& place, const Room& room, const Decays& decays, DecayGradients& found) {
  const size_t n = place.state_size(), p = place.head_dim(), length = place.chunk.length;
  const ScanGradient& scan = place.scan;
  const float *x = scan.mixed + place.x_at(), *after = scan.state_gradients + place.state_at(place.number);
  pack_rows(after, n, p, room.state);
  multiply_all({scan.mixed + place.b_at(), n, 1}, length, room.state, p, 0, n, {room.ends, p});
  float factors[CHUNK], passing = 0.0f;
  for (size_t s = 0; s < length; ++s) {
    const float decay = decays.to_end[s], *end = room.ends + s * p;
    factors[s] = decay * place.steps()[s];
    for (size_t i = 0; i < p; i += LANES) {
      float* source = room.sources + s * p + i;
      store(source, fma(load(end + i), splat(decay), load(source)));
    }
    found.values[s] += passing;
    passing += factors[s] * dot(x + s * p, end, p);
  }
  scale_rows(x, factors, length, p, room.scaled);
  pack_columns(after, n, p, room.state_columns);
  multiply_all({room.scaled, p, 1}, length, room.state_columns, n, 0, p, onto(scan.gradients + place.b_at(), n));
}

// The slope of dt over what it is made of: none outside the limits.
void find_slopes(const Place& place, float* slopes) {
  const Mamba2& call = *place.scan.call;
  load_raw_steps(place, slopes);
  for (size_t s = 0; s < CHUNK; s += LANES) {
    const F32 raw = load(slopes + s), step = softplus(raw), zero = splat(0.0f);
    const F32 slope = where_less(step, splat(call.min_step), zero, sigmoid(raw));
    store(slopes + s, where_less(splat(call.max_step), step, zero, slope));
  }
}

// x's gradient in the place of y's, dt's into `projected`, and the parts of the sums over tokens.
void finish_head(const Place& place, const Room& room, const DecayGradients& found) {
  const ScanGradient& scan = place.scan;
  const Mamba2& call = *scan.call;
  const size_t p = place.head_dim(), column = scan.sizes.inner + scan.sizes.channels + place.head;
  const float d = call.d[place.head], a = rate_of(call, place.head);
  float slopes[CHUNK];
  find_slopes(place, slopes);
  float a_sum = 0.0f, d_sum = 0.0f, bias_sum = 0.0f;
  for (size_t s = 0; s < place.chunk.length; ++s) {
    const float *x = scan.mixed + place.x_at() + s * p, step = place.steps()[s];
    float *gradient = scan.gradients + place.x_at() + s * p, *source = room.sources + s * p;
    d_sum += dot(x, gradient, p);
    const float of_step = dot(x, source, p) + a * found.values[s];
    for (size_t i = 0; i < p; i += LANES)
      store(gradient + i, fma(load(source + i), splat(step), splat(d) * load(gradient + i)));
    a_sum += step * a * found.values[s];
    const float of_raw = of_step * slopes[s];
    scan.projected[(place.chunk.start + s) * scan.sizes.projected + column] = of_raw;
    bias_sum += of_raw;
  }
  float* sums = scan.sums + (place.number * call.num_heads + place.head) * 3;
  sums[0] = a_sum;
  sums[1] = d_sum;
  sums[2] = bias_sum;
}

void differentiate_head(const Place& place, const Room& room) {
  DecayGradients found;
  const Decays decays = decays_of(place);
  differentiate_pairs(place, room, found);
  if (!place.chunk.is_first) differentiate_state_before(place, room, decays, found);
  if (!place.chunk.is_last) differentiate_state_after(place, room, decays, found);
  if (!place.chunk.is_first && !place.chunk.is_last) {
    const size_t at = place.state_at(place.number), size = place.state_size() * place.head_dim();
    const float through = decays.whole * dot(place.scan.states + at, place.scan.state_gradients + at, size);
    for (float& decay : found.values) decay += through;
  }
  finish_head(place, room, found);
}

}  // namespace

ScanGradient take_scan_gradient(Scratch& memory, const Mamba2& call, int num_threads) {
  ScanGradient scan{};
  scan.call = &call;
  scan.sizes = sizes_of(call);
  const size_t num_sequences = call.batch.num_sequences, num_heads = call.num_heads;
  size_t* first_chunks = memory.take<size_t>(num_sequences + 1);
  Chunk* chunks = memory.take<Chunk>(scan.sizes.num_tokens / CHUNK + num_sequences);
  for (size_t sequence = 0; sequence < num_sequences; ++sequence) {
    const size_t start = call.batch.starts[sequence], stop = call.batch.starts[sequence + 1];
    first_chunks[sequence] = scan.num_chunks;
    for (size_t at = start; at < stop; at += CHUNK)
      chunks[scan.num_chunks++] = {at, smaller(CHUNK, stop - at), at == start, stop - at <= CHUNK};
  }
  first_chunks[num_sequences] = scan.num_chunks;
  scan.chunks = chunks;
  scan.first_chunks = first_chunks;
  const size_t num_states = scan.num_chunks * num_heads * call.state_size * call.head_dim;
  scan.steps = memory.take<float>(num_heads * scan.sizes.num_tokens);
  scan.logs = memory.take<float>(num_heads * scan.sizes.num_tokens);
  scan.states = memory.take<float>(num_states);
  scan.state_gradients = memory.take<float>(num_states);
  scan.sums = memory.take<float>(scan.num_chunks * num_heads * 3);
  scan.member_size = room_size(call);
  scan.members = memory.take<float>(num_threads * scan.member_size);
  return scan;
}

void measure_steps(Team& team, const ScanGradient& scan) {
  const size_t num_heads = scan.call->num_heads;
  for_each(team, scan.num_chunks * num_heads, 1, [&](size_t task) {
    const Place place = place_of(scan, task / num_heads, task % num_heads);
    const size_t at = place.head * scan.sizes.num_tokens + place.chunk.start;
    const float rate = rate_of(*scan.call, place.head);
    float steps[CHUNK], log = 0.0f;
    load_raw_steps(place, steps);
    for (size_t s = 0; s < CHUNK; s += LANES)
      store(steps + s, clamped(softplus(load(steps + s)), scan.call->min_step, scan.call->max_step));
    for (size_t s = 0; s < place.chunk.length; ++s) {
      scan.steps[at + s] = steps[s];
      scan.logs[at + s] = log += steps[s] * rate;
    }
  });
}

void pass_states(Team& team, int member, const ScanGradient& scan) {
  const size_t num_heads = scan.call->num_heads;
  const Room room = room_of(scan, member);
  for_each(team, 2 * static_cast<size_t>(scan.call->batch.num_sequences) * num_heads, 1, [&](size_t task) {
    const int sequence = static_cast<int>(task / 2 / num_heads);
    task % 2 ? pass_forward(scan, room, sequence, task / 2 % num_heads)
             : pass_backward(scan, room, sequence, task / 2 % num_heads);
  });
}

void differentiate_chunks(Team& team, int member, const ScanGradient& scan) {
  const size_t num_groups = scan.call->num_groups, heads = scan.call->num_heads / num_groups;
  const Room room = room_of(scan, member);
  for_each(team, scan.num_chunks * num_groups, 1, [&](size_t task) {
    const size_t first = task % num_groups * heads;
    const Place group = place_of(scan, task / num_groups, first);
    begin_group(group, room);
    for (size_t head = first; head < first + heads; ++head) differentiate_head(place_of(scan, group.number, head), room);
    end_group(group, room);
  });
}

void sum_chunks(Team& team, const ScanGradient& scan, float* a_log, float* d, float* dt_bias) {
  const size_t num_heads = scan.call->num_heads;
  for_each(team, num_heads, 1, [&](size_t head) {
    a_log[head] = d[head] = dt_bias[head] = 0.0f;
    for (size_t chunk = 0; chunk < scan.num_chunks; ++chunk) {
      const float* sums = scan.sums + (chunk * num_heads + head) * 3;
      a_log[head] += sums[0];
      d[head] += sums[1];
      dt_bias[head] += sums[2];
    }
  });
}

}  // namespace freehold::FREEHOLD_FORM
