// Causal attention over pages: scores, softmax and mix.
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
#include <cmath>

#include "attention_pages.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// The most sums of multiply-adds that stay in registers, and the rows of a strip: those that are summed together.
#if defined(__AVX512F__)
constexpr int SUMS_IN_REGISTERS = 20, STRIP_ROWS = 8;
#else
constexpr int SUMS_IN_REGISTERS = 6, STRIP_ROWS = 6;
#endif
// A float32 page is read by the multiply-add itself; what a narrower one widens to takes a sum's place.
template <typename Page>
constexpr int SUMS_BESIDE = sizeof(Page) == sizeof(float) ? SUMS_IN_REGISTERS : SUMS_IN_REGISTERS - 1;

constexpr int TILE_ROWS = 48;  // a block of keys stays in the nearest cache for this many rows
constexpr float LANE_NUMBERS[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

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
inline void score_keys(const float* queries, const Page* keys, [[maybe_unused]] const float* scales, const Page* ahead,
                       int head_dim, float* scores) {
  F32 sums[ROWS][GROUPS];
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) sums[row][group] = splat(0.0f);
  for (int k = 0; k < head_dim; ++k) {
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) {
      const int at = (group * head_dim + k) * LANES;
      const F32 key = load_page(keys + at);
      prefetch(ahead + at);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
        sums[row][group] = fma(splat(queries[row * head_dim + k]), key, sums[row][group]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 16
    for (int group = 0; group < GROUPS; ++group) {
      if constexpr (IS_SCALED<Page>) sums[row][group] = sums[row][group] * load(scales + group * LANES);
      store(scores + row * KEYS_PER_BLOCK + group * LANES, sums[row][group]);
    }
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
      const F32 value = load_page(values + at);
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
  const float *key_scales, *value_scales;  // null where pages are not scaled
};

// Writes the scores of a strip, all 32 of the block: slots that hold nothing yet spoil their own lanes alone.
template <int ROWS, typename Page>
void score_strip(Tile& tile, int strip, const Block<Page>& block, int head_dim) {
  const int start = tile.strip_start(strip);
  constexpr int groups = GROUPS_OF<ROWS, Page>;
  for (int key = 0; key < KEYS_PER_BLOCK; key += groups * LANES)
    score_keys<ROWS, groups>(tile.queries + start * head_dim, block.keys + key * head_dim, block.key_scales + key,
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

// The weights of scaled values carry their scale. What a row does not see stays unread.
void scale_weights(Tile& tile, int first_row, const float* scales) {
  for (int row = first_row; row < tile.num_rows; ++row)
    for (int key = 0; key < KEYS_PER_BLOCK; key += LANES) {
      float* weights = tile.weights + row * KEYS_PER_BLOCK + key;
      store(weights, load(weights) * load(scales + key));
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
    const float plain_sum = sum_of_lanes(load(tile.sums + row * LANES));
    const F32 sum = splat(plain_sum);
    for (int k = 0; k < head_dim; k += LANES)
      store(a.out + out_row * head_dim + k, load(tile.mixes + row * head_dim + k) / sum);
    if (a.log_sums) a.log_sums[out_row] = tile.maxima[row] + std::log(plain_sum);
  }
}

template <typename Page>
Block<Page> block_at(const Attention& a, int sequence, int kv_head, int start, int end) {
  const std::size_t before = keys_before(a, sequence, kv_head, start);
  const int next = start + KEYS_PER_BLOCK < end ? start + KEYS_PER_BLOCK : start;
  const Page *keys = static_cast<const Page*>(a.key_pages), *values = static_cast<const Page*>(a.value_pages);
  Block<Page> block{start, keys + before * a.head_dim, values + before * a.head_dim,
                    keys + keys_before(a, sequence, kv_head, next) * a.head_dim, nullptr, nullptr};
  if constexpr (IS_SCALED<Page>) block.key_scales = a.key_scales + before, block.value_scales = a.value_scales + before;
  return block;
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
    if constexpr (IS_SCALED<Page>) scale_weights(tile, tile.strip_start(first_strip), block.value_scales);
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

void attend(Team& team, const Attention& attention) {
  switch (attention.page_element) {
    case PageElement::float32: return attend_pages<float>(team, attention);
    case PageElement::bfloat16: return attend_pages<std::uint16_t>(team, attention);
    case PageElement::int8: return attend_pages<std::int8_t>(team, attention);
  }
}

void attention_inner(const Attention& attention, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    rotate_and_write(team, attention);
    team.barrier();
    attend(team, attention);
  });
}

}  // namespace freehold::FREEHOLD_FORM
