// How the two phases of attention find their way in pages.
#pragma once

#include <type_traits>

#include "attention.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {

constexpr int smaller(int a, int b) { return a < b ? a : b; }
constexpr int larger(int a, int b) { return a > b ? a : b; }
constexpr int divided_up(int a, int b) { return (a + b - 1) / b; }

template <typename Page>
constexpr bool IS_SCALED = std::is_same_v<Page, std::int8_t>;

template <typename Page>
inline F32 load_page(const Page* from) {
  if constexpr (IS_SCALED<Page>) return widened(from);
  else return load(from);
}

// The keys and values before the block of a sequence that holds `position`, in either kind of pages, for one key/value
// head.
inline std::size_t keys_before(const Attention& a, int sequence, int kv_head, int position) {
  const Batch& batch = a.batch;
  const std::size_t row = static_cast<std::size_t>(sequence) * batch.pages_per_sequence + position / batch.page_size;
  const std::size_t page_head = static_cast<std::size_t>(batch.pages[row]) * a.num_kv_heads + kv_head;
  const std::size_t in_page = position % batch.page_size / KEYS_PER_BLOCK * KEYS_PER_BLOCK;
  return page_head * batch.page_size + in_page;
}

inline std::size_t token_width(const Attention& a) {
  return static_cast<std::size_t>(a.num_heads + 2 * a.num_kv_heads) * a.head_dim;
}

}  // namespace freehold::FREEHOLD_FORM
