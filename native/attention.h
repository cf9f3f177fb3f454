// Causal attention over paged keys and values; the twin is in src/freehold/ops/attention.py.
//
// One algorithm for a whole prompt, a chunk of it and a single token, so that all give the same bits: a query meets the
// keys of its sequence in blocks of KEYS_PER_BLOCK, counted from position 0, and carries a running maximum, a running
// sum and a running mix from block to block (online softmax: Milakov and Gimelshein, 2018, arXiv 1805.02867).
#pragma once

#include "batch.h"
#include "pool.h"

namespace freehold {

constexpr int KEYS_PER_BLOCK = 32;  // a page holds a whole number of blocks
constexpr int MAX_HEAD_DIM = 256;   // what the kernel's scratch on the stack has room for

enum class PageElement : int { float32 = 0, bfloat16 = 1, int8 = 2 };

struct Attention {
  int num_heads;     // H; query head h reads key/value head h / (H / J)
  int num_kv_heads;  // J
  int head_dim;      // K, a multiple of 16, at most MAX_HEAD_DIM
  Batch batch;
  // [T, (H + 2 J) K]: queries, keys and values of each token side by side, biases added; queries are rotated in place
  float* qkv;
  // [positions, K]: per position K / 2 cosines, then K / 2 sines; null where there are no positional encodings
  const float* rotation;
  PageElement page_element;
  void* key_pages;    // [pages, J, page_size / 16, K, 16]: sixteen keys side by side, so that lanes are keys
  void* value_pages;  // [pages, J, page_size, K]
  float *key_scales, *value_scales;  // [pages, J, page_size], what int8 values are times; null for the other pages
  float* out;         // [T, H K]
  float* log_sums;    // [T, H], the logarithm of each row's sum of e**score; null where nobody wants it
};

// The gradient of attention over whole sequences, which have no context and whose pages hold plain elements.
struct AttentionGradient {
  Attention call;         // as it was; its pages are not read, its `qkv` is what the call left there
  const float* out;       // [T, H K], the gradient to begin with
  float* qkv;             // [T, (H + 2 J) K], to be written
};

#ifdef FREEHOLD_FORM
namespace FREEHOLD_FORM {

// Two phases of one team, with a barrier between them that the caller puts there. All members call each.
void rotate_and_write(Team& team, const Attention& attention);
void attend(Team& team, const Attention& attention);

// Both phases, and their gradient.
void attention_inner(const Attention& attention, int num_threads);
void attention_gradient(const AttentionGradient& gradient, int num_threads);

}  // namespace FREEHOLD_FORM
#endif

}  // namespace freehold
