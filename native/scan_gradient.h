// The gradient of the scan of Mamba-2, in chunks of tokens whose inner part is made of products of matrices.
#pragma once

#include "mamba2_channels.h"
#include "scratch.h"

#ifdef FREEHOLD_FORM
namespace freehold::FREEHOLD_FORM {

constexpr std::size_t CHUNK = 64;  // tokens; a choice of speed, no gradient depends on it beyond rounding

// Tokens of one sequence.
struct Chunk {
  std::size_t start, length;
  bool is_first, is_last;  // of its sequence
};

// Everything that the phases work on.
struct ScanGradient {
  const Mamba2* call;
  Sizes sizes;
  const float* mixed;      // x, b and c, as the convolution gives them
  float* gradients;        // in the same places: first those of y, in the end those of x, b and c
  float* projected;        // gradients [T, I + C + H], of which the last columns are written
  const Chunk* chunks;
  std::size_t num_chunks;
  const std::size_t* first_chunks;  // [B + 1], of each sequence
  float* steps;            // [H, T], dt
  float* logs;             // [H, T], the sum of dt A from the chunk's first token on
  float* states;           // [chunks, H, N, P] before the chunk, where it is not the first
  float* state_gradients;  // [chunks, H, N, P] after the chunk, where it is not the last
  float* sums;             // [chunks, H, 3], parts of the gradients of a_log, d and dt_bias
  float* members;          // of each member `member_size` floats
  std::size_t member_size;
};

// A head at a chunk, with its group: where what belongs to them begins.
struct Place {
  const ScanGradient& scan;
  const Chunk& chunk;
  std::size_t number, head, group;

  std::size_t head_dim() const { return scan.call->head_dim; }
  std::size_t state_size() const { return scan.call->state_size; }
  std::size_t x_at() const { return (scan.sizes.num_tokens * head + chunk.start) * head_dim(); }
  std::size_t b_at() const {
    return scan.sizes.num_tokens * (scan.sizes.inner + group * state_size()) + chunk.start * state_size();
  }
  std::size_t c_at() const { return b_at() + scan.sizes.num_tokens * scan.call->num_groups * state_size(); }
  const float* steps() const { return scan.steps + head * scan.sizes.num_tokens + chunk.start; }
  const float* logs() const { return scan.logs + head * scan.sizes.num_tokens + chunk.start; }
  std::size_t state_at(std::size_t of_chunk) const {
    return (of_chunk * scan.call->num_heads + head) * state_size() * head_dim();
  }
};

inline Place place_of(const ScanGradient& scan, std::size_t chunk, std::size_t head) {
  return {scan, scan.chunks[chunk], chunk, head, head / (scan.call->num_heads / scan.call->num_groups)};
}

// Takes memory for a call whose scan has `num_threads` members.
ScanGradient take_scan_gradient(Scratch& memory, const Mamba2& call, int num_threads);

// Three phases, a barrier between them. A task of the first is a head of a chunk, of the second a head of a sequence in
// one direction of time, of the third a group of a chunk.
void measure_steps(Team& team, const ScanGradient& scan);
void pass_states(Team& team, int member, const ScanGradient& scan);
void differentiate_chunks(Team& team, int member, const ScanGradient& scan);

// The last phase: the parts of all chunks, in their order. A task is a head.
void sum_chunks(Team& team, const ScanGradient& scan, float* a_log, float* d, float* dt_bias);

}  // namespace freehold::FREEHOLD_FORM
#endif
