// One form's kernels. The build compiles kernels.cpp once per form; which forms a machine runs is cpu.h's to say.
#pragma once

#include "dense_gradient.h"
#include "mixers.h"
#include "peaks.h"
#include "sampling.h"

namespace freehold {

struct Kernels {
  const char* form;
  void (*rms_norm)(const Residual& from, void* out, int num_threads);  // which may be where it comes from
  void (*embed)(const Matrix& table, const std::int64_t* tokens, const Residual& to, int num_threads);
  void (*linear)(const Linear&, int num_threads);
  void (*sample)(const Draw* draws, std::size_t num_rows, std::size_t width, std::int64_t* tokens, int num_threads);
  void (*mlp)(const Mlp&, int num_threads);
  void (*attention)(AttentionMixer, int num_threads);
  void (*mamba2)(Mamba2Mixer, int num_threads);
  void (*mamba2_inner)(const Mamba2&, int num_threads);
  void (*mamba2_gradient)(const Mamba2Gradient&, int num_threads);
  void (*moe)(const Moe&, int num_threads);
  void (*choose_experts)(const Moe& router, float* logits, std::size_t num_tokens, std::int32_t* experts, float* weights,
                         int num_threads);
  void (*sum_chosen)(const float* results, const std::int32_t* places, const float* weights, std::size_t num_tokens,
                     int num_chosen, std::size_t width, float* out, int num_threads);
  void (*squares_gradient)(const float* squares, const float* weights, std::size_t num_rows, std::size_t width,
                           float* out, float* of_weights, int num_threads);
  void (*norm_gradient)(const NormGradient&, int num_threads);
  void (*activate)(const Activation&, float* out, int num_threads);
  void (*activation_gradient)(const Activation&, const float* out, float* gate, float* up, int num_threads);
  void (*cross_entropy)(const CrossEntropy&, int num_threads);
  void (*attention_inner)(const Attention&, int num_threads);
  void (*attention_gradient)(const AttentionGradient&, int num_threads);
  double (*multiply_in_registers)(Arithmetic, std::size_t num_rounds, int num_threads);
  void (*read_memory)(const std::uint8_t* data, std::size_t num_bytes, int num_threads);
};

}  // namespace freehold
