// The gradient of causal attention over whole sequences (Dao, 2023, arXiv 2307.08691, section 3.1.2, algorithm 2): the
// weights are computed once more from queries, keys and the kept logarithms of sums, a block of keys and a block of
// queries at a time.
//
//   p  = e**(q k / sqrt(K) - log_sum)        dv = p^T dout      dp = dout v^T
//   ds = p * (dp - delta) / sqrt(K)          dq = ds k          dk = ds^T q         delta = sum over K of dout * out
//
// Operations: five products of BLOCK x BLOCK x K for a pair of blocks, against two in the forward; bytes are those of
// blocks that stay in the nearest caches. The multipliers bound it.
//
// A task is a key/value head of a sequence, all of its query heads: every gradient has one writer and one order of
// summation (blocks of keys for dq; query heads, then blocks of queries for dk and dv), so threads and company change no
// bit. There are J tasks to a sequence; a single long one leaves further threads idle.
#include "attention_pages.h"
#include "elements.h"
#include "products.h"
#include "rotate.h"
#include "scratch.h"

namespace freehold::FREEHOLD_FORM {
namespace {

using std::size_t;

constexpr int BLOCK = 48;  // keys, and queries: whole lanes, and whole tiles of six rows
constexpr float POSITIONS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// What a member works in.
struct Room {
  float* deltas;           // [H / J, L]
  float *keys, *values;    // [BLOCK, K], rotated and rounded as pages hold them; absent ones zero
  Panels keys_down;        // depth: keys
  Panels keys_across;      // depth: K
  Panels values_across;    // depth: K
  Panels queries_down, out_down;  // depth: queries; `out` is the gradient of the output
  float *weights, *scores_gradient;    // [BLOCK, BLOCK]
  float *keys_gradient, *values_gradient;  // [BLOCK, K]
};

Room take_room(Scratch& memory, size_t head_dim, size_t group, size_t longest) {
  const auto rows = [&] { return memory.take<float>(BLOCK * head_dim); };
  const auto square = [&] { return memory.take<float>(BLOCK * BLOCK); };
  float *deltas = memory.take<float>(group * longest), *keys = rows(), *values = rows();
  const Panels keys_down{rows(), BLOCK}, keys_across{rows(), head_dim}, values_across{rows(), head_dim};
  const Panels queries_down{rows(), BLOCK}, out_down{rows(), BLOCK};
  float *weights = square(), *scores_gradient = square(), *keys_gradient = rows(), *values_gradient = rows();
  return {deltas, keys, values, keys_down, keys_across, values_across, queries_down, out_down,
          weights, scores_gradient, keys_gradient, values_gradient};
}

// One key/value head of a sequence.
struct Task {
  const AttentionGradient& gradient;
  const Attention& a;
  const Room& room;
  size_t first_token, num_tokens;
  int kv_head;
  float scale;

  size_t head_dim() const { return a.head_dim; }
  int group() const { return a.num_heads / a.num_kv_heads; }
  int head(int of_group) const { return kv_head * group() + of_group; }
  size_t query_at(size_t token, int h) const { return (first_token + token) * token_width(a) + h * head_dim(); }
  size_t key_at(size_t token) const { return query_at(token, a.num_heads + kv_head); }
  size_t value_at(size_t token) const { return query_at(token, a.num_heads + a.num_kv_heads + kv_head); }
  size_t out_at(size_t token, int h) const { return ((first_token + token) * a.num_heads + h) * head_dim(); }
  const float* rotation(size_t token) const { return a.rotation + token * head_dim(); }
};

// As a page of the call's elements would have held it.
inline void round_to_page(const Attention& a, float* head) {
  if (a.page_element == PageElement::float32) return;
  std::uint16_t rounded[LANES];
  for (int k = 0; k < a.head_dim; k += LANES) {
    store(rounded, load(head + k));
    store(head + k, load(rounded));
  }
}

void load_keys(const Task& task, size_t first, size_t count) {
  const Room& room = task.room;
  const size_t head_dim = task.head_dim();
  for (size_t i = 0; i < BLOCK; ++i) {
    float *key = room.keys + i * head_dim, *value = room.values + i * head_dim;
    if (i >= count) {
      for (size_t k = 0; k < head_dim; ++k) key[k] = value[k] = 0.0f;
      continue;
    }
    const float *from_key = task.a.qkv + task.key_at(first + i), *from_value = task.a.qkv + task.value_at(first + i);
    for (size_t k = 0; k < head_dim; k += LANES) store(key + k, load(from_key + k)), store(value + k, load(from_value + k));
    if (task.a.rotation) rotate_head(key, key, task.rotation(first + i), task.a.head_dim);
    round_to_page(task.a, key);
    round_to_page(task.a, value);
  }
  pack_rows(room.keys, BLOCK, head_dim, room.keys_down);
  pack_columns(room.keys, BLOCK, head_dim, room.keys_across);
  pack_columns(room.values, BLOCK, head_dim, room.values_across);
}

// Rows `pitch` apart as panels.
void pack_rows_apart(const float* from, size_t pitch, size_t num_rows, size_t num_columns, const Panels& to) {
  for (size_t column = 0; column < num_columns; column += LANES)
    for (size_t row = 0; row < num_rows; ++row) store(to.at(column / LANES, row), load(from + row * pitch + column));
}

void sum_deltas(const Task& task) {
  for (int i = 0; i < task.group(); ++i)
    for (size_t token = 0; token < task.num_tokens; ++token) {
      const size_t at = task.out_at(token, task.head(i));
      F32 sum = splat(0.0f);
      for (size_t k = 0; k < task.head_dim(); k += LANES)
        sum = fma(load(task.gradient.out + at + k), load(task.a.out + at + k), sum);
      task.room.deltas[i * task.num_tokens + token] = sum_of_lanes(sum);
    }
}

// Scores become weights, and the gradient of weights that of scores; what a query does not see is zero in both.
void weigh(const Task& task, int of_group, size_t first_query, size_t num_queries, size_t first_key) {
  const float* deltas = task.room.deltas + of_group * task.num_tokens;
  const F32 scale = splat(task.scale), lanes = load(POSITIONS), zero = splat(0.0f);
  for (size_t row = 0; row < num_queries; ++row) {
    const size_t token = first_query + row;
    const F32 log_sum = splat(task.a.log_sums[(task.first_token + token) * task.a.num_heads + task.head(of_group)]);
    const F32 delta = splat(deltas[token]);
    for (size_t key = 0; key < BLOCK; key += LANES) {
      float *weight = task.room.weights + row * BLOCK + key, *score = task.room.scores_gradient + row * BLOCK + key;
      const F32 seen = splat(static_cast<float>(token + 1) - static_cast<float>(first_key + key));
      const F32 p = where_less(lanes, seen, exp(load(weight) * scale - log_sum), zero);
      store(weight, p);
      store(score, p * (load(score) - delta) * scale);
    }
  }
}

// One block of queries of one head meets the block of keys at hand.
void meet(const Task& task, int of_group, size_t first_query, size_t first_key, bool is_first) {
  const Room& room = task.room;
  const size_t head_dim = task.head_dim(), left = task.num_tokens - first_query;
  const size_t num_queries = left < BLOCK ? left : BLOCK, out_pitch = task.a.num_heads * head_dim;
  const float* queries = task.a.qkv + task.query_at(first_query, task.head(of_group));
  const float* out = task.gradient.out + task.out_at(first_query, task.head(of_group));
  multiply_all({queries, token_width(task.a), 1}, num_queries, room.keys_across, BLOCK, 0, head_dim, {room.weights, BLOCK});
  multiply_all({out, out_pitch, 1}, num_queries, room.values_across, BLOCK, 0, head_dim, {room.scores_gradient, BLOCK});
  weigh(task, of_group, first_query, num_queries, first_key);
  float* dq = task.gradient.qkv + task.query_at(first_query, task.head(of_group));
  Target to_queries{dq, token_width(task.a)};
  if (first_key > 0) to_queries.before = dq;
  multiply_all({room.scores_gradient, BLOCK, 1}, num_queries, room.keys_down, head_dim, 0, BLOCK, to_queries);
  pack_rows_apart(queries, token_width(task.a), num_queries, head_dim, room.queries_down);
  pack_rows_apart(out, out_pitch, num_queries, head_dim, room.out_down);
  const Target to_keys{room.keys_gradient, head_dim, is_first ? nullptr : room.keys_gradient};
  const Target to_values{room.values_gradient, head_dim, is_first ? nullptr : room.values_gradient};
  multiply_all({room.scores_gradient, 1, BLOCK}, BLOCK, room.queries_down, head_dim, 0, num_queries, to_keys);
  multiply_all({room.weights, 1, BLOCK}, BLOCK, room.out_down, head_dim, 0, num_queries, to_values);
}

void write_keys_gradient(const Task& task, size_t first, size_t count) {
  const size_t head_dim = task.head_dim();
  for (size_t i = 0; i < count; ++i) {
    float *key = task.gradient.qkv + task.key_at(first + i), *value = task.gradient.qkv + task.value_at(first + i);
    for (size_t k = 0; k < head_dim; k += LANES) {
      store(key + k, load(task.room.keys_gradient + i * head_dim + k));
      store(value + k, load(task.room.values_gradient + i * head_dim + k));
    }
    if (task.a.rotation) rotate_head_back(key, task.rotation(first + i), task.a.head_dim);
  }
}

void run(const Task& task) {
  sum_deltas(task);
  for (size_t key = 0; key < task.num_tokens; key += BLOCK) {
    const size_t left = task.num_tokens - key, count = left < BLOCK ? left : BLOCK;
    load_keys(task, key, count);
    for (int i = 0; i < task.group(); ++i)
      for (size_t query = key; query < task.num_tokens; query += BLOCK) meet(task, i, query, key, i == 0 && query == key);
    write_keys_gradient(task, key, count);
  }
  if (!task.a.rotation) return;
  for (size_t token = 0; token < task.num_tokens; ++token)
    for (int i = 0; i < task.group(); ++i)
      rotate_head_back(task.gradient.qkv + task.query_at(token, task.head(i)), task.rotation(token), task.a.head_dim);
}

}  // namespace

void attention_gradient(const AttentionGradient& gradient, int num_threads) {
  const Attention& a = gradient.call;
  const Batch& batch = a.batch;
  const auto length = [&](int sequence) { return static_cast<size_t>(batch.starts[sequence + 1] - batch.starts[sequence]); };
  size_t longest = 0;
  for (int sequence = 0; sequence < batch.num_sequences; ++sequence) longest = longest < length(sequence) ? length(sequence) : longest;
  Scratch& memory = scratch();
  memory.reset();
  Room* rooms = memory.take<Room>(num_threads);
  for (int member = 0; member < num_threads; ++member)
    rooms[member] = take_room(memory, a.head_dim, a.num_heads / a.num_kv_heads, longest);
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(a.head_dim));
  const size_t num_tasks = static_cast<size_t>(batch.num_sequences) * a.num_kv_heads;
  run_team(num_threads, [&](Team& team, int member) {
    for (size_t i; (i = team.claim()) < num_tasks;) {
      const int sequence = static_cast<int>(i / a.num_kv_heads), kv_head = static_cast<int>(i % a.num_kv_heads);
      run({gradient, a, rooms[member], static_cast<size_t>(batch.starts[sequence]), length(sequence), kv_head, scale});
    }
  });
}

}  // namespace freehold::FREEHOLD_FORM
