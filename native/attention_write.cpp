// The first phase of attention: queries and keys turned by their positions, and the pages' new entries.
#include "attention_pages.h"
#include "rotate.h"
#include "rows.h"

namespace freehold::FREEHOLD_FORM {
namespace {

constexpr int ROTATE_TOKENS = 32;  // most tokens of a task
constexpr int SPREAD = 4;          // tasks for each member, so that a late one delays little

// Rounds a head to what pages hold. Returns the scale of int8 values: the largest magnitude / 127, NaN where one is no
// finite number.
template <typename Page>
float round_head(const float* from, Page* to, int head_dim) {
  F32 factor = splat(1.0f);
  float scale = 1.0f;
  if constexpr (IS_SCALED<Page>) {
    float largest = 0.0f;
    for (int k = 0; k < head_dim; k += LANES) {
      const float here = largest_magnitude(load(from + k), load(from + k));
      if (here > largest || here != here) largest = here;
    }
    const bool is_finite = largest <= __FLT_MAX__, is_zero = largest < SMALLEST_MAGNITUDE;
    factor = splat(is_finite && !is_zero ? 127.0f / largest : 0.0f);
    scale = !is_finite ? __builtin_nanf("") : is_zero ? 0.0f : largest / 127.0f;
  }
  for (int k = 0; k < head_dim; k += LANES) {
    if constexpr (IS_SCALED<Page>) store(to + k, scale > 0.0f ? load(from + k) * factor : splat(0.0f));
    else store(to + k, load(from + k));
  }
  return scale;
}

template <typename Page>
float write_key(const float* key, Page* block, int slot, int head_dim) {
  Page rounded[MAX_HEAD_DIM];
  const float scale = round_head(key, rounded, head_dim);
  Page* lane = block + slot / LANES * LANES * head_dim + slot % LANES;
  for (int k = 0; k < head_dim; ++k) lane[k * LANES] = rounded[k];
  return scale;
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
  const std::size_t before = keys_before(a, sequence, kv_head, position), slot = position % KEYS_PER_BLOCK;
  Page* values = static_cast<Page*>(a.value_pages) + (before + slot) * head_dim;
  const float key_scale = write_key(key, static_cast<Page*>(a.key_pages) + before * head_dim, slot, head_dim);
  const float value_scale = round_head(value, values, head_dim);
  if constexpr (IS_SCALED<Page>) {
    a.key_scales[before + slot] = key_scale;
    a.value_scales[before + slot] = value_scale;
  }
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

}  // namespace

void rotate_and_write(Team& team, const Attention& attention) {
  switch (attention.page_element) {
    case PageElement::float32: return rotate_and_write_pages<float>(team, attention);
    case PageElement::bfloat16: return rotate_and_write_pages<std::uint16_t>(team, attention);
    case PageElement::int8: return rotate_and_write_pages<std::int8_t>(team, attention);
  }
}

}  // namespace freehold::FREEHOLD_FORM
