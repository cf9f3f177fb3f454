// The inside of a Mamba-2 mixer, from the input projection's output to the output projection's input: convolution,
// scan, gate and grouped norm. Twins: causal_conv, scan_reference and gated_group_rms_norm in src/freehold/ops.
//
// One algorithm for a whole prompt, a chunk of it and a single token, so that all give the same bits; states are
// updated in place. Three phases, a team's barrier between them: `convolve`, `scan`, `gate_and_normalize`.
#pragma once

#include "batch.h"
#include "elements.h"
#include "pool.h"

namespace freehold {

struct Mamba2 {
  int num_heads;    // H
  int head_dim;     // P, a multiple of 16
  int state_size;   // N, a multiple of 16
  int num_groups;   // G; head h belongs to group h / (H / G)
  int conv_kernel;  // W, at most 8
  float norm_eps;
  float min_step, max_step;  // limits of softplus(dt + bias)
  Batch batch;
  // [T, I + C + H], I = H P, C = I + 2 G N: gate | x, b, c before the convolution | dt
  const float* projected;
  Element weight_element;   // of the next three
  const void* conv_weight;  // [C, W], the last tap on the current token
  const void* conv_bias;    // [C]
  const void* norm_weight;  // [I]
  const float* a_log;       // [H]
  const float* d;           // [H]
  const float* dt_bias;     // [H]
  Element tail_element;
  void* conv_tail;  // [slots, W - 1, C]; rows are rounded to its element before anything uses them
  float* ssm;       // [slots, H, N, P]
  // T C floats of scratch: x, b and c after the convolution, in blocks whose tokens lie side by side: per head x
  // [T, P], then per group b [T, N], then per group c [T, N]. The scan writes y over x.
  float* mixed;
  float* out;  // [T, I]
};

// The gradients of a call whose sequences begin with empty states and leave none. Where one is [T, I + C + H] its columns
// are those of `projected`.
struct Mamba2Gradient {
  Mamba2 call;                // as it was, but its states are not read
  const float* mixed;         // what the call left there: y, [H, T, P], comes first
  const float* out;           // [T, I], the gradient to begin with
  float* projected;           // [T, I + C + H], to be written like all that follow
  float* conv_weight;         // [C, W]
  float* conv_bias;           // [C]
  float* norm_weight;         // [I]
  float *a_log, *d, *dt_bias; // [H]
};

}  // namespace freehold

#ifdef FREEHOLD_FORM
namespace freehold::FREEHOLD_FORM {

// projected, conv_tail -> x, b and c in mixed; conv_tail. A task is some channels of all sequences.
void convolve(Team& team, const Mamba2& call);

// x, b and c in mixed, dt in projected, ssm -> y in mixed, in place of x; ssm. A task is a head of a sequence.
void scan(Team& team, const Mamba2& call);

// y in mixed, gate in projected -> out. A task is a group of some tokens.
void gate_and_normalize(Team& team, const Mamba2& call);

}  // namespace freehold::FREEHOLD_FORM
#endif
