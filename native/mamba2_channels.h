// What the phases of Mamba-2 and those of its gradient share: sizes, and channels of the convolution with their weights.
#pragma once

#include "mamba2.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {

constexpr int MAX_TAPS = 8;    // a power of two, so that the rows of the convolution go around cheaply
constexpr int MAX_STRIPS = 4;  // strips of sixteen channels in a task of the convolution

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

// The sizes of a call, in elements.
struct Sizes {
  std::size_t num_tokens, inner, channels, projected;
};

inline Sizes sizes_of(const Mamba2& call) {
  const std::size_t inner = static_cast<std::size_t>(call.num_heads) * call.head_dim;
  const std::size_t channels = inner + 2 * static_cast<std::size_t>(call.num_groups) * call.state_size;
  return {static_cast<std::size_t>(call.batch.num_tokens()), inner, channels, inner + channels + call.num_heads};
}

// Consecutive channels of a task, sixteen to a strip, and where the strips of token 0 are in `mixed`.
struct Channels {
  std::size_t first;
  int num_strips;
  float weight[MAX_TAPS][MAX_STRIPS * LANES], bias[MAX_STRIPS * LANES];
  std::size_t at[MAX_STRIPS], pitch[MAX_STRIPS];
};

template <typename Weight>
inline void load_weights(const Mamba2& call, Channels& channels) {
  const std::size_t num_taps = call.conv_kernel;
  const Weight* bias = static_cast<const Weight*>(call.conv_bias) + channels.first;
  const Weight* weight = static_cast<const Weight*>(call.conv_weight) + channels.first * num_taps;
  const auto transpose = [&](std::size_t taps) {
    for (int i = 0; i < channels.num_strips * LANES; ++i) {
      channels.bias[i] = wide(bias[i]);
      for (std::size_t tap = 0; tap < taps; ++tap) channels.weight[tap][i] = wide(weight[i * taps + tap]);
    }
  };
  // A single token spends most of its time here, and half of that when the compiler knows the number.
  num_taps == 4 ? transpose(4) : transpose(num_taps);
}

// A strip lies within one head or group, because their widths are multiples of sixteen.
inline void place_strips(const Mamba2& call, const Sizes& sizes, Channels& channels) {
  for (int strip = 0; strip < channels.num_strips; ++strip) {
    const std::size_t channel = channels.first + strip * LANES;
    const bool is_x = channel < sizes.inner;
    const std::size_t width = is_x ? call.head_dim : call.state_size;
    const std::size_t within = (is_x ? channel : channel - sizes.inner) % width;
    channels.at[strip] = sizes.num_tokens * (channel - within) + within;
    channels.pitch[strip] = width;
  }
}

inline std::size_t num_channel_tasks(const Sizes& sizes) {
  return (sizes.channels + MAX_STRIPS * LANES - 1) / (MAX_STRIPS * LANES);
}

inline Channels channels_of(const Mamba2& call, const Sizes& sizes, std::size_t task) {
  Channels channels;
  channels.first = task * MAX_STRIPS * LANES;
  channels.num_strips = static_cast<int>(smaller(MAX_STRIPS * LANES, sizes.channels - channels.first) / LANES);
  if (call.weight_element == Element::float32)
    load_weights<float>(call, channels);
  else
    load_weights<std::uint16_t>(call, channels);
  place_strips(call, sizes, channels);
  return channels;
}

// A row of the convolution in the element of the tail that keeps it.
inline F32 rounded(F32 value, Element element) {
  if (element == Element::float32) return value;
  std::uint16_t lanes[LANES];
  store(lanes, value);
  return load(lanes);
}

// log(1 + e**x) = max(x, 0) + log1p(w) with w = e**-|x|, and log1p(w) = 2 atanh(s) with s = w / (2 + w) <= 1/3, whose
// series ends where the next term is below 2e-9 of the sum.
inline F32 softplus(F32 x) {
  const F32 w = exp(splat(0.0f) - absolute(x));
  const F32 s = w / (splat(2.0f) + w), square = s * s;
  F32 series = splat(1.0f / 15.0f);
  series = fma(series, square, splat(1.0f / 13.0f));
  series = fma(series, square, splat(1.0f / 11.0f));
  series = fma(series, square, splat(1.0f / 9.0f));
  series = fma(series, square, splat(1.0f / 7.0f));
  series = fma(series, square, splat(1.0f / 5.0f));
  series = fma(series, square, splat(1.0f / 3.0f));
  series = fma(series, square, splat(1.0f));
  return max(x, splat(0.0f)) + (s + s) * series;
}

inline F32 clamped(F32 value, float low, float high) {
  value = where_less(value, splat(low), splat(low), value);
  return where_less(splat(high), value, splat(high), value);
}

}  // namespace freehold::FREEHOLD_FORM
