// The quantized formats in panels: how sixteen rows of a block format lie side by side, and how a kernel reads them.
//
// A panel is a row of super-groups, each of `groups` groups of thirty-two columns:
//
//   scales of the super-group | scales, values of group 0 | scales, values of group 1 | ...
//
// Every scale field holds sixteen entries, one per row. Values lie in quads, the four columns 4 i to 4 i + 3 of all
// sixteen rows: byte 4 n + j belongs to row n, column 4 i + j. Bits are split into planes of 64 bytes:
//
//   low four bits     plane i / 2: quad i in the low nibbles where i is even, in the high ones where it is odd
//   the fifth         one plane: bit i of each byte belongs to quad i
//   fifth and sixth   plane 4 + i / 4: bits 2 (i % 4) and the next
//   all eight         plane i: quad i, as signed bytes
//
// So a group takes 64 bytes per bit of its values, as many as in the file. Adding a format is adding its line at the end,
// with a new kind of scales where it has one.
#pragma once

#include "matrix.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {

constexpr std::size_t HALVES = PANEL_ROWS * 2;  // bytes of a field of halves

inline F32 halves(const std::uint8_t* from) { return load_half(reinterpret_cast<const std::uint16_t*>(from)); }

// value = d (q - zero)
struct HalfScale {
  static constexpr std::size_t groups = 1, super_bytes = 0, group_bytes = HALVES;
  static constexpr bool has_minimum = false;
  static constexpr int scales_per_group = 1;
  static F32 scale(const std::uint8_t*, const std::uint8_t* group, int) { return halves(group); }
  static F32 minimum(const std::uint8_t*, const std::uint8_t*) { return splat(0.0f); }
};

// value = d q + m
struct HalfScaleAndMinimum {
  static constexpr std::size_t groups = 1, super_bytes = 0, group_bytes = 2 * HALVES;
  static constexpr bool has_minimum = true;
  static constexpr int scales_per_group = 1;
  static F32 scale(const std::uint8_t*, const std::uint8_t* group, int) { return halves(group); }
  static F32 minimum(const std::uint8_t*, const std::uint8_t* group) { return halves(group + HALVES); }
};

// value = (d s) q - m t, d and m per super-group of 256 columns, s and t per group
struct SuperScaleAndMinimum {
  static constexpr std::size_t groups = 8, super_bytes = 2 * HALVES, group_bytes = 2 * PANEL_ROWS;
  static constexpr bool has_minimum = true;
  static constexpr int scales_per_group = 1;
  static F32 scale(const std::uint8_t* super, const std::uint8_t* group, int) { return halves(super) * widened(group); }
  static F32 minimum(const std::uint8_t* super, const std::uint8_t* group) {
    return splat(0.0f) - halves(super + HALVES) * widened(group + PANEL_ROWS);
  }
};

// value = (d s) (q - zero), d per super-group of 256 columns, s per half of a group
struct SuperScalePerHalf {
  static constexpr std::size_t groups = 8, super_bytes = HALVES, group_bytes = 2 * PANEL_ROWS;
  static constexpr bool has_minimum = false;
  static constexpr int scales_per_group = 2;
  static F32 scale(const std::uint8_t* super, const std::uint8_t* group, int half) {
    return halves(super) * widened(reinterpret_cast<const std::int8_t*>(group) + PANEL_ROWS * half);
  }
  static F32 minimum(const std::uint8_t*, const std::uint8_t*) { return splat(0.0f); }
};

template <int num_bits, int zero_point, typename Scales>
struct Packed {
  using S = Scales;
  static constexpr int bits = num_bits;
  static constexpr int zero = zero_point;
  static constexpr bool lies_in_memory = true;  // rather than in L1, unpacked
  static constexpr std::size_t group_bytes = Scales::group_bytes + 64 * num_bits;
  static constexpr std::size_t super_bytes = Scales::super_bytes + Scales::groups * group_bytes;

  // The sixteen rows' values of quad i, as they meet a row's in add_products.
  template <int i>
  static Bytes quad(const std::uint8_t* group) {
    const std::uint8_t* planes = group + Scales::group_bytes;
    if constexpr (bits == 8) {
      return as_eight_bits(load_bytes(planes + 64 * i));
    } else {
      const Bytes plane = load_bytes(planes + 64 * (i / 2));
      const Bytes low = i % 2 == 0 ? plane & 0x0F : shifted_right<4>(plane, 0x0F);
      if constexpr (bits == 4) return low;
      else if constexpr (bits == 5) return low | moved<i, 4>(load_bytes(planes + 256), 0x10);
      else return low | moved<2 * (i % 4), 4>(load_bytes(planes + 256 + 64 * (i / 4)), 0x30);
    }
  }

 private:
  template <int from, int to>
  static Bytes moved(Bytes plane, std::uint8_t mask) {
    if constexpr (from < to) return shifted_left<to - from>(plane, mask);
    else if constexpr (from > to) return shifted_right<from - to>(plane, mask);
    else return plane & mask;
  }
};

using Q8_0 = Packed<8, EIGHT_BIT_ZERO, HalfScale>;
using Q4_0 = Packed<4, 8, HalfScale>;
using Q4_1 = Packed<4, 0, HalfScaleAndMinimum>;
using Q5_0 = Packed<5, 16, HalfScale>;
using Q5_1 = Packed<5, 0, HalfScaleAndMinimum>;
using Q4_K = Packed<4, 0, SuperScaleAndMinimum>;
using Q5_K = Packed<5, 0, SuperScaleAndMinimum>;
using Q6_K = Packed<6, 32, SuperScalePerHalf>;

}  // namespace freehold::FREEHOLD_FORM
