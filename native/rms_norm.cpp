// The portable form of RMSNorm.
//
// Bytes per row: reads hidden once from memory and once from cache, reads weight (in cache after the first row), writes
// out. Operations: 4 per element. Bound by memory bandwidth for many rows, by the latency of a few adds for one row.
#include "rms_norm.h"

namespace freehold {
namespace {

inline void store(float* out, float value) { *out = value; }
inline void store(std::uint16_t* out, float value) { *out = bfloat16_of(value); }

inline float cast(float value, const float*) { return value; }
inline float cast(float value, const std::uint16_t*) { return float_of(bfloat16_of(value)); }

template <typename H>
float row_scale(const H* hidden, std::size_t width, float eps) {
  float lanes[LANES] = {};
  std::size_t i = 0;
  for (; i + LANES <= width; i += LANES)
    for (std::size_t lane = 0; lane < LANES; ++lane) {
      const float value = float_of(hidden[i + lane]);
      lanes[lane] = lanes[lane] + value * value;
    }
  for (std::size_t lane = 0; i + lane < width; ++lane) {
    const float value = float_of(hidden[i + lane]);
    lanes[lane] = lanes[lane] + value * value;
  }
  return scale_of(lanes, width, eps);
}

template <typename H, typename W, bool cast_first>
void rows(const RmsNorm& call) {
  const W* weight = static_cast<const W*>(call.weight);
  for (std::size_t token = 0; token < call.num_tokens; ++token) {
    const H* hidden = static_cast<const H*>(call.hidden) + token * call.width;
    H* out = static_cast<H*>(call.out) + token * call.width;
    const float scale = row_scale(hidden, call.width, call.eps);
    for (std::size_t i = 0; i < call.width; ++i) {
      const float unit = float_of(hidden[i]) * scale;
      store(out + i, (cast_first ? cast(unit, hidden) : unit) * float_of(weight[i]));
    }
  }
}

template <typename H, typename W>
void in_order(const RmsNorm& call) {
  call.cast_then_multiply ? rows<H, W, true>(call) : rows<H, W, false>(call);
}

}  // namespace

void rms_norm_portable(const RmsNorm& call) {
  const bool wide_weight = call.weight_element == Element::float32;
  if (call.hidden_element == Element::float32)
    wide_weight ? in_order<float, float>(call) : in_order<float, std::uint16_t>(call);
  else
    wide_weight ? in_order<std::uint16_t, float>(call) : in_order<std::uint16_t, std::uint16_t>(call);
}

}  // namespace freehold
