// One form's kernels. The build compiles kernels.cpp once per form; which forms a machine runs is cpu.h's to say.
#pragma once

#include "mixers.h"

namespace freehold {

struct Kernels {
  const char* form;
  void (*rms_norm)(const Residual& from, void* out);
  void (*linear)(const Linear&, int num_threads);
  void (*mlp)(const Mlp&, int num_threads);
  void (*attention)(AttentionMixer, int num_threads);
  void (*mamba2)(Mamba2Mixer, int num_threads);
  void (*moe)(const Moe&, int num_threads);
};

}  // namespace freehold
