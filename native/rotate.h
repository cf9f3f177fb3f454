// The rotation of heads by their positions: channel i pairs with i + K / 2. `rotation` has K / 2 cosines, then K / 2 sines.
#pragma once

#include "simd.h"

namespace freehold::FREEHOLD_FORM {

inline F32 rotated_first(F32 first, F32 second, F32 cosine, F32 sine) {
  return fma(first, cosine, splat(0.0f) - second * sine);
}
inline F32 rotated_second(F32 first, F32 second, F32 cosine, F32 sine) { return fma(second, cosine, first * sine); }

// One head turned by its position's angles; `to` may be `from`.
inline void rotate_head(const float* from, float* to, const float* rotation, int head_dim) {
  const int half = head_dim / 2;
  int k = 0;
  for (; k + LANES <= half; k += LANES) {
    const F32 first = load(from + k), second = load(from + half + k);
    const F32 cosine = load(rotation + k), sine = load(rotation + half + k);
    store(to + k, rotated_first(first, second, cosine, sine));
    store(to + half + k, rotated_second(first, second, cosine, sine));
  }
  if (const int left = half - k; left > 0) {
    const F32 first = load_first(from + k, left), second = load_first(from + half + k, left);
    const F32 cosine = load_first(rotation + k, left), sine = load_first(rotation + half + k, left);
    store_first(to + k, rotated_first(first, second, cosine, sine), left);
    store_first(to + half + k, rotated_second(first, second, cosine, sine), left);
  }
}

// The same turn back: what is asked of a turned head, asked of the head before.
inline void rotate_head_back(float* head, const float* rotation, int head_dim) {
  const int half = head_dim / 2;
  for (int k = 0; k < half; k += LANES) {
    const std::size_t count = half - k < LANES ? half - k : LANES;
    const F32 first = load_first(head + k, count), second = load_first(head + half + k, count);
    const F32 cosine = load_first(rotation + k, count), sine = load_first(rotation + half + k, count);
    store_first(head + k, fma(first, cosine, second * sine), count);
    store_first(head + half + k, fma(second, cosine, splat(0.0f) - first * sine), count);
  }
}

}  // namespace freehold::FREEHOLD_FORM
