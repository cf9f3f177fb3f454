// The mixers' calls: what each residual block hands to a kernel. One call does a whole block:
// hidden = hidden + mixer(norm(hidden)).
#pragma once

#include "attention.h"
#include "mamba2.h"
#include "matrix.h"
#include "residual.h"

namespace freehold {

// A product with a whole matrix: out = rows times the matrix, plus the bias. Outside any block: the output head.
struct Linear {
  const void* rows;  // [T, K]
  Element element;   // of rows
  std::size_t num_rows;
  Matrix matrix;     // [N, K]
  const void* bias;  // [N], or null
  Element bias_element;
  void* out;  // [T, N]
  Element out_element;
};

// down(silu(gate(x)) * up(x)), or down(relu(up(x)) ** 2) where there is no gate; x = norm(hidden).
struct Mlp {
  Residual residual;
  Matrix gate;  // [F, D], or none; plain where `up` is and only there
  Matrix up;    // [F, D]
  Matrix down;  // [D, F]
};

struct AttentionMixer {
  Residual residual;
  Matrix qkv[3];          // [H K, D], [J K, D], [J K, D]
  const void* biases[3];  // [H K], [J K], [J K], or null
  Element bias_element;
  Matrix output;        // [D, H K]
  Attention attention;  // its qkv and out are set by the call
};

struct Mamba2Mixer {
  Residual residual;
  Matrix input;   // [I + C + H, D]
  Matrix output;  // [D, I]
  Mamba2 mamba2;  // its projected, mixed and out are set by the call
};

// out(sum over a token's experts of weight * down(relu(up(z)) ** 2)) + shared(x), x = norm(hidden), z = in(x). Without a
// latent space `in` and `out` are the identity.
struct Moe {
  Residual residual;
  Matrix gate;              // [E, D], plain
  const float* correction;  // [E]
  int num_experts, num_chosen, num_groups, num_chosen_groups;
  bool normalize_weights;
  float scale;
  Matrix up, down;                     // of expert 0: [F, Z], [Z, F]
  std::size_t up_stride, down_stride;  // bytes from one expert to the next
  Matrix shared_up, shared_down;       // [S, D], [D, S]
  Matrix latent_in, latent_out;        // [Z, D], [D, Z], or none
};

constexpr int MAX_EXPERTS = 1024;  // the choice is made on the stack

}  // namespace freehold
