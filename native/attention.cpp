// Causal attention over pages: rotation of queries and keys, the pages' new entries, scores, softmax and mix.
//
// Operations: 2 K multiply-adds and one exponential for each pair of a query row and a key it sees. Bytes: a tile of
// query rows reads each key and value it sees once, 2 K elements a key. A prompt's tile of TILE_ROWS rows is bound by
// multiply-adds. A single token has H / J rows, and reading the pages bounds it where those are few: an AVX2 core does
// 16 multiply-adds and takes some 5 bytes of memory a cycle, in balance at 13 rows of float32 and 6 of bfloat16.
//
// What makes the bits independent of tiles, threads, chunks and company: a score is one chain of fused multiply-adds
// over k, in a lane of its own; a row's maximum and sums see whole blocks, masked keys as exact zeros; a mixed value is
// one chain over the keys the row sees, and a key it does not see is not multiplied by zero but left out (0 * NaN, and
// -0 + 0, would tell).
#include "attention.h"

#include "simd.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// The most sums of multiply-adds that stay in registers, and the rows of a strip: those that are summed together.
#if defined(__AVX512F__)
constexpr int SUMS_IN_REGISTERS = 20, STRIP_ROWS = 8;
#else
constexpr int SUMS_IN_REGISTERS = 6, STRIP_ROWS = 6;
#endif
// A float32 page is read by the multiply-add itself; what a bfloat16 widens to takes a sum's place.
template <typename Page>
constexpr int SUMS_BESIDE = sizeof(Page) == sizeof(float) ? SUMS_IN_REGISTERS : SUMS_IN_REGISTERS - 1;

constexpr int TILE_ROWS = 48;      // a block of keys stays in the nearest cache for this many rows
constexpr int ROTATE_TOKENS = 32;  // most tokens of a task of rotate_and_write
constexpr int SPREAD = 4;          // tasks for each member, so that a late one delays little
constexpr float LANE_NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

// Where the block of a sequence that holds `position` begins, in either kind of pages, for one key/value head.
std::size_t block_offset(const Attention& a, int sequence, int kv_head, int position) {
  const Batch& batch = a.batch;
  const std::size_t row = static_cast<std::size_t>(sequence) * batch.pages_per_sequence + position / batch.page_size;
  const std::size_t page_head = static_cast<std::size_t>(batch.pages[row]) * a.num_kv_heads + kv_head;
  const std::size_t in_page = position % batch.page_size / KEYS_PER_BLOCK * KEYS_PER_BLOCK;
  return (page_head * batch.page_size + in_page) * a.head_dim;
}

std::size_t token_width(const Attention& a) {
  return static_cast<std::size_t>(a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
}

// ---- Phase 1: rotation, and the pages' new entries ----

inline F32 rotated_first(F32 first, F32 second, F32 cosine, F32 sine) {
  return fma(first, cosine, splat(0.0f) - second * sine);
}
inline F32 rotated_second(F32 first, F32 second, F32 cosine, F32 sine) { return fma(second, cosine, first * sine); }

// One head turned by its position's angles; `to` may be `from`. Channel i pairs with i + K / 2.
void rotate_head(const float* from, float* to, const float* rotation, int head_dim) {
  const int half = head_dim / 2;
  int k = 0;
  for (; k + LANES <= half; k += LANES) {
    const F32 first = load(from + k), second = load(from + half + k);
    const F32 cosine = load(rotation + k), sine = load(rotation + half + k);
    store(to + k, rotated_first(first, second, cosine, sine));
    store(to + half + k, rotated_second(first, second, cosine, sine));
  }
  if (const int left = half - k; left > 0) {
    const F32 first = load_first(from + k, left), second = load_first(from + half + k, left);
    const F32 cosine = load_first(rotation + k, left), sine = load_first(rotation + half + k, left);
    store_first(to + k, rotated_first(first, second, cosine, sine), left);
    store_first(to + half + k, rotated_second(first, second, cosine, sine), left);
  }
}

template <typename Page>
void write_key(const float* key, Page* block, int slot, int head_dim) {
  Page rounded[MAX_HEAD_DIM];
  for (int k = 0; k < head_dim; k += LANES) store(rounded + k, load(key + k));
  Page* lane = block + slot / LANES * LANES * head_dim + slot % LANES;
  for (int k = 0; k < head_dim; ++k) lane[k * LANES] = rounded[k];
}

template <typename Page>
void write_value(const float* value, Page* block, int slot, int head_dim) {
  for (int k = 0; k < head_dim; k += LANES) store(block + slot * head_dim + k, load(value + k));
}

// One token's queries of one key/value head, its key and its value.
template <typename Page>
void rotate_and_write_token(const Attention& a, int sequence, int token, int kv_head) {
  const int position = a.batch.contexts[sequence] + token - a.batch.starts[sequence];
  const int group = a.num_heads / a.num_kv_heads, head_dim = a.head_dim;
  float* of_token = a.qkv + token * token_width(a);
  const float* key = of_token + (a.num_heads + kv_head) * head_dim;
  const float* value = key + a.num_kv_heads * head_dim;
  float rotated_key[MAX_HEAD_DIM];
  if (a.rotation != nullptr) {
    const float* rotation = a.rotation + static_cast<std::size_t>(position) * head_dim;
    for (int head = kv_head * group; head < (kv_head + 1) * group; ++head)
      rotate_head(of_token + head * head_dim, of_token + head * head_dim, rotation, head_dim);
    rotate_head(key, rotated_key, rotation, head_dim);
    key = rotated_key;
  }
  const std::size_t offset = block_offset(a, sequence, kv_head, position);
  write_key(key, static_cast<Page*>(a.key_pages) + offset, position % KEYS_PER_BLOCK, head_dim);
  write_value(value, static_cast<Page*>(a.value_pages) + offset, position % KEYS_PER_BLOCK, head_dim);
}

// Tasks are some tokens of one key/value head. Neighbours in a sequence share the lines of its keys, so that a task
// takes many where there are many.
template <typename Page>
void rotate_and_write_pages(Team& team, const Attention& a) {
  const int num_tokens = a.batch.num_tokens();
  const int task_tokens = larger(1, smaller(ROTATE_TOKENS, num_tokens / (SPREAD * team.size())));
  const std::size_t num_tasks = static_cast<std::size_t>(divided_up(num_tokens, task_tokens)) * a.num_kv_heads;
  int sequence = 0;
  for (std::size_t task = team.claim(); task < num_tasks; task = team.claim()) {
    const int kv_head = static_cast<int>(task % a.num_kv_heads);
    const int first = static_cast<int>(task / a.num_kv_heads) * task_tokens;
    while (a.batch.starts[sequence + 1] <= first) ++sequence;  // tasks come in order, so it never steps back
    int of_token = sequence;
    for (int token = first; token < smaller(first + task_tokens, num_tokens); ++token) {
      while (a.batch.starts[of_token + 1] <= token) ++of_token;
      rotate_and_write_token<Page>(a, of_token, token, kv_head);
    }
  }
}

// ---- Phase 2: attention ----

// Rows of one sequence and one key/value head, in order of token and then of query head: row i is head i % G of token
// i / G, with G = H / J. Rows are worked on in strips of nearly equal height.
struct Tile {
  int num_rows, num_strips;
  int sees[TILE_ROWS];  // keys from position 0 that the row sees; never falls from row to row
  alignas(64) float maxima[TILE_ROWS + LANES], previous_maxima[TILE_ROWS + LANES], corrections[TILE_ROWS + LANES];
  alignas(64) float sums[TILE_ROWS * LANES];               // lane i sums the weights of keys i, i + 16, i + 32, ...
  alignas(64) float weights[TILE_ROWS * KEYS_PER_BLOCK];   // scores first, then what softmax makes of them
  alignas(64) float queries[TILE_ROWS * MAX_HEAD_DIM];     // [rows, K], scaled
  alignas(64) float mixes[TILE_ROWS * MAX_HEAD_DIM];       // [rows, K]

  int strip_start(int strip) const { return strip * num_rows / num_strips; }
  int rows_of_strip(int strip) const { return strip_start(strip + 1) - strip_start(strip); }
  // How many keys of a block that begins at `start` a row sees.
  int sees_of_block(int row, int start) const { return larger(0, smaller(KEYS_PER_BLOCK, sees[row] - start)); }
};

// The inner loops. Sums stay in registers, for which they must be unrolled early: hence the pragmas. Each vector of the
// block at hand asks for its counterpart in the block that is wanted next, which lies in other pages of memory and is
// read with strides, so that the processor does not foresee it.

// 16 * GROUPS keys meet ROWS queries, lanes are keys.
template <int ROWS, int GROUPS, typename Page>
inline void score_keys(const float* queries, const Page* keys, const Page* ahead, int head_dim, float* scores) {
  F32 sums[ROWS][GROUPS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) sums[row][group] = splat(0.0f);
  for (int k = 0; k < head_dim; ++k) {
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) {
      const int at = (group * head_dim + k) * LANES;
      const F32 key = load(keys + at);
      prefetch(ahead + at);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
        sums[row][group] = fma(splat(queries[row * head_dim + k]), key, sums[row][group]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) store(scores + row * KEYS_PER_BLOCK + group * LANES, sums[row][group]);
}

// Keys from `first` to `end` give 16 * COLUMNS of their values to ROWS rows, lanes are values.
template <int ROWS, int COLUMNS, typename Page>
inline void mix_columns(const float* weights, const Page* values, const Page* ahead, int first, int end, int head_dim,
                        const float* corrections, float* mixes) {
  F32 sums[ROWS][COLUMNS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column)
      sums[row][column] = load(mixes + row * head_dim + column * LANES) * splat(corrections[row]);
  for (int key = first; key < end; ++key) {
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column) {
      const int at = key * head_dim + column * LANES;
      const F32 value = load(values + at);
      prefetch(ahead + at);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
        sums[row][column] = fma(splat(weights[row * KEYS_PER_BLOCK + key]), value, sums[row][column]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int column = 0; column < COLUMNS; ++column) store(mixes + row * head_dim + column * LANES, sums[row][column]);
}

// Few rows take more keys or columns at a time, for sums enough to hide a multiply-add's latency.
template <int ROWS, typename Page>
constexpr int GROUPS_OF = 2 * ROWS <= SUMS_BESIDE<Page> ? 2 : 1;
template <int ROWS, typename Page>
constexpr int COLUMNS_OF = 4 * ROWS <= SUMS_BESIDE<Page> ? 4 : GROUPS_OF<ROWS, Page>;

// As many columns at a time as fit, then half as many for what is left.
template <int ROWS, typename Page, int COLUMNS = COLUMNS_OF<ROWS, Page>>
void mix_rows(const float* weights, const Page* values, const Page* ahead, int first, int end, int head_dim,
              const float* corrections, float* mixes, int k = 0) {
  for (; k + COLUMNS * LANES <= head_dim; k += COLUMNS * LANES)
    mix_columns<ROWS, COLUMNS>(weights, values + k, ahead + k, first, end, head_dim, corrections, mixes + k);
  if constexpr (COLUMNS > 1)
    mix_rows<ROWS, Page, COLUMNS / 2>(weights, values, ahead, first, end, head_dim, corrections, mixes, k);
}

// Keys and values of one block, and the keys of the next.
template <typename Page>
struct Block {
  int start;  // position of its first key
  const Page *keys, *values, *next_keys;
};

// Writes the scores of a strip, all 32 of the block: slots that hold nothing yet spoil their own lanes alone.
template <int ROWS, typename Page>
void score_strip(Tile& tile, int strip, const Block<Page>& block, int head_dim) {
  const int start = tile.strip_start(strip);
  constexpr int groups = GROUPS_OF<ROWS, Page>;
  for (int key = 0; key < KEYS_PER_BLOCK; key += groups * LANES)
    score_keys<ROWS, groups>(tile.queries + start * head_dim, block.keys + key * head_dim,
                             block.values + key * head_dim, head_dim, tile.weights + start * KEYS_PER_BLOCK + key);
}

// Adds a block's values to the mixes of a strip: the keys that every row sees together, the rest row by row.
//
//           key 0 1 2 3 4 5
//     row 0     x x x . . .
//     row 1     x x x + . .      x together, + row by row
//     row 2     x x x + + .
template <int ROWS, typename Page>
void mix_strip(Tile& tile, int strip, const Block<Page>& block, int head_dim) {
  const int start = tile.strip_start(strip), shared = tile.sees_of_block(start, block.start);
  float* mixes = tile.mixes + start * head_dim;
  const float* weights = tile.weights + start * KEYS_PER_BLOCK;
  mix_rows<ROWS>(weights, block.values, block.next_keys, 0, shared, head_dim, tile.corrections + start, mixes);
  const float unchanged = 1.0f;
  for (int row = 1; row < ROWS; ++row) {
    const int end = tile.sees_of_block(start + row, block.start);
    if (end > shared)
      mix_rows<1>(weights + row * KEYS_PER_BLOCK, block.values, block.next_keys, shared, end, head_dim, &unchanged,
                  mixes + row * head_dim);
  }
}

// From a strip's height, known as it runs, to the function made for it.
template <int ROWS = STRIP_ROWS, typename Page>
void score_any_strip(Tile& tile, int strip, const Block<Page>& block, int head_dim) {
  if constexpr (ROWS > 0) {
    if (tile.rows_of_strip(strip) == ROWS) return score_strip<ROWS>(tile, strip, block, head_dim);
    score_any_strip<ROWS - 1>(tile, strip, block, head_dim);
  }
}
template <int ROWS = STRIP_ROWS, typename Page>
void mix_any_strip(Tile& tile, int strip, const Block<Page>& block, int head_dim) {
  if constexpr (ROWS > 0) {
    if (tile.rows_of_strip(strip) == ROWS) return mix_strip<ROWS>(tile, strip, block, head_dim);
    mix_any_strip<ROWS - 1>(tile, strip, block, head_dim);
  }
}

// Turns scores into weights: e**(score - running maximum), and 0 for keys the row does not see.
void weigh_rows(Tile& tile, int first_row, int start) {
  const F32 lanes = load(LANE_NUMBERS), masked = splat(-__builtin_inff());
  for (int row = first_row; row < tile.num_rows; ++row) {
    float* scores = tile.weights + row * KEYS_PER_BLOCK;
    F32 low = load(scores), high = load(scores + LANES);
    const int seen = tile.sees_of_block(row, start);
    if (seen < KEYS_PER_BLOCK) {
      store(scores, low = where_less(lanes, splat(static_cast<float>(seen)), low, masked));
      store(scores + LANES, high = where_less(lanes, splat(static_cast<float>(seen - LANES)), high, masked));
    }
    const float most = max_of_lanes(max(low, high)), previous = tile.maxima[row];
    tile.previous_maxima[row] = previous;
    tile.maxima[row] = most > previous ? most : previous;
  }
  for (int row = first_row; row < tile.num_rows; row += LANES)
    store(tile.corrections + row, exp(load(tile.previous_maxima + row) - load(tile.maxima + row)));
  for (int row = first_row; row < tile.num_rows; ++row) {
    float* weights = tile.weights + row * KEYS_PER_BLOCK;
    const F32 most = splat(tile.maxima[row]);
    const F32 low = exp(load(weights) - most), high = exp(load(weights + LANES) - most);
    store(weights, low);
    store(weights + LANES, high);
    float* sums = tile.sums + row * LANES;
    store(sums, fma(load(sums), splat(tile.corrections[row]), low + high));
  }
}

// Takes in the queries of rows from `first_row`, scaled, and what each may see.
void begin_tile(Tile& tile, const Attention& a, int sequence, int kv_head, int first_row, int num_rows) {
  const int group = a.num_heads / a.num_kv_heads, head_dim = a.head_dim;
  const F32 scale = splat(1.0f) / square_root(splat(static_cast<float>(head_dim)));
  tile.num_rows = num_rows;
  tile.num_strips = divided_up(num_rows, STRIP_ROWS);
  for (int row = 0; row < num_rows; ++row) {
    const int token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const float* query = a.qkv + (a.batch.starts[sequence] + token) * token_width(a) + head * head_dim;
    for (int k = 0; k < head_dim; k += LANES) {
      store(tile.queries + row * head_dim + k, load(query + k) * scale);
      store(tile.mixes + row * head_dim + k, splat(0.0f));
    }
    store(tile.sums + row * LANES, splat(0.0f));
    tile.sees[row] = a.batch.contexts[sequence] + token + 1;
  }
  for (int row = 0; row < TILE_ROWS + LANES; ++row) tile.maxima[row] = tile.previous_maxima[row] = -__builtin_inff();
}

void finish_tile(const Tile& tile, const Attention& a, int sequence, int kv_head, int first_row) {
  const int group = a.num_heads / a.num_kv_heads, head_dim = a.head_dim;
  for (int row = 0; row < tile.num_rows; ++row) {
    const int token = (first_row + row) / group, head = kv_head * group + (first_row + row) % group;
    const std::size_t out_row = static_cast<std::size_t>(a.batch.starts[sequence] + token) * a.num_heads + head;
    const F32 sum = splat(sum_of_lanes(load(tile.sums + row * LANES)));
    for (int k = 0; k < head_dim; k += LANES)
      store(a.out + out_row * head_dim + k, load(tile.mixes + row * head_dim + k) / sum);
  }
}

template <typename Page>
Block<Page> block_at(const Attention& a, int sequence, int kv_head, int start, int end) {
  const std::size_t offset = block_offset(a, sequence, kv_head, start);
  const int next = start + KEYS_PER_BLOCK < end ? start + KEYS_PER_BLOCK : start;
  const Page *keys = static_cast<const Page*>(a.key_pages), *values = static_cast<const Page*>(a.value_pages);
  return {start, keys + offset, values + offset, keys + block_offset(a, sequence, kv_head, next)};
}

template <typename Page>
void attend_tile(const Attention& a, int sequence, int kv_head, int first_row, int num_rows) {
  Tile tile;
  begin_tile(tile, a, sequence, kv_head, first_row, num_rows);
  const int end = tile.sees[num_rows - 1];
  for (int start = 0, first_strip = 0; start < end; start += KEYS_PER_BLOCK) {
    // Strips that see nothing from here on are done.
    while (tile.sees[tile.strip_start(first_strip + 1) - 1] <= start) ++first_strip;
    const Block<Page> block = block_at<Page>(a, sequence, kv_head, start, end);
    for (int strip = first_strip; strip < tile.num_strips; ++strip) score_any_strip(tile, strip, block, a.head_dim);
    weigh_rows(tile, tile.strip_start(first_strip), start);
    for (int strip = first_strip; strip < tile.num_strips; ++strip) mix_any_strip(tile, strip, block, a.head_dim);
  }
  finish_tile(tile, a, sequence, kv_head, first_row);
}

// Tasks are tiles: sequence by sequence, the last rows first, as they have most to do.
template <typename Page>
void attend_pages(Team& team, const Attention& a) {
  const int group = a.num_heads / a.num_kv_heads;
  const auto rows_of = [&](int sequence) { return (a.batch.starts[sequence + 1] - a.batch.starts[sequence]) * group; };
  const auto tasks_of = [&](int sequence) { return divided_up(rows_of(sequence), TILE_ROWS) * a.num_kv_heads; };
  std::size_t first_task = 0;  // of the sequence; tasks come in order, so neither steps back
  int sequence = 0;
  for (std::size_t task = team.claim();; task = team.claim()) {
    while (sequence < a.batch.num_sequences && task >= first_task + tasks_of(sequence))
      first_task += tasks_of(sequence++);
    if (sequence == a.batch.num_sequences) return;
    const int of_sequence = static_cast<int>(task - first_task), kv_head = of_sequence % a.num_kv_heads;
    const int first_row = (tasks_of(sequence) - 1 - of_sequence) / a.num_kv_heads * TILE_ROWS;
    attend_tile<Page>(a, sequence, kv_head, first_row, smaller(TILE_ROWS, rows_of(sequence) - first_row));
  }
}

}  // namespace

void rotate_and_write(Team& team, const Attention& attention) {
  if (attention.page_element == Element::bfloat16) return rotate_and_write_pages<std::uint16_t>(team, attention);
  rotate_and_write_pages<float>(team, attention);
}

void attend(Team& team, const Attention& attention) {
  if (attention.page_element == Element::bfloat16) return attend_pages<std::uint16_t>(team, attention);
  attend_pages<float>(team, attention);
}

}  // namespace freehold::FREEHOLD_FORM
