// How packed tokens divide into sequences, as Layout in src/freehold/models/layout.py says it.
#pragma once

#include <cstdint>

namespace freehold {

struct Batch {
  std::int32_t num_sequences;     // B
  const std::int32_t* starts;     // [B + 1], the first token of each sequence, and the end of the last
  const std::int32_t* contexts;   // [B], tokens that each sequence already has in its states
  const std::int32_t* slots;      // [B], its entry of a recurrent state
  const std::int32_t* pages;      // [B, pages_per_sequence], its pages in order of position
  std::int32_t pages_per_sequence;
  std::int32_t page_size;         // tokens per page

  std::int32_t num_tokens() const { return starts[num_sequences]; }
};

}  // namespace freehold
