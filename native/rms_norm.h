// RMSNorm of each row; the twin, and the specification, is rms_norm_reference in src/freehold/ops/norm.py.
//
// Both forms give the same bits. The sum of squares of a row is kept in LANES partial sums: element i goes to lane
// i % LANES, in order of i, and the lanes are then added in a fixed tree of halves. Products and sums are rounded one
// by one (the build forbids contraction to fused multiply-add), so any width of vector gives the same numbers, and a
// row never sees another row.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace freehold {

enum class Element { float32, bfloat16 };

struct RmsNorm {
  void* out;           // [T, D], elements as hidden
  const void* hidden;  // [T, D]
  const void* weight;  // [D]
  std::size_t num_tokens;
  std::size_t width;
  float eps;
  Element hidden_element;
  Element weight_element;
  bool cast_then_multiply;  // round to the elements of hidden before the weight, and again after it
};

void rms_norm_portable(const RmsNorm& call);
void rms_norm_avx512(const RmsNorm& call);  // only where has_avx512()

// Internal linkage: each file compiles its own copies with its own instructions. With external linkage the linker
// could hand the portable form a copy that was compiled for AVX-512.
namespace {

constexpr std::size_t LANES = 32;

[[maybe_unused]] inline float float_of(std::uint16_t bfloat16) {
  const std::uint32_t bits = static_cast<std::uint32_t>(bfloat16) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

[[maybe_unused]] inline float float_of(float value) { return value; }

// Round to nearest, ties to even; every NaN becomes the one that torch writes.
[[maybe_unused]] inline std::uint16_t bfloat16_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const std::uint16_t rounded = static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
  return (bits & 0x7FFFFFFFu) > 0x7F800000u ? std::uint16_t{0x7FC0} : rounded;
}

// One over the root mean square, from the partial sums of one row. Mutates: lanes.
[[maybe_unused]] inline float scale_of(float (&lanes)[LANES], std::size_t width, float eps) {
  for (std::size_t half = LANES / 2; half > 0; half /= 2)
    for (std::size_t lane = 0; lane < half; ++lane) lanes[lane] = lanes[lane] + lanes[lane + half];
  return 1.0f / std::sqrt(lanes[0] / static_cast<float>(width) + eps);
}

}  // namespace
}  // namespace freehold
