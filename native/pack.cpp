#include "pack.h"

#include <cstring>

namespace freehold {
namespace {

// A format as both sides see it. Block layouts: src/freehold/quantize/gguf_blocks.py; panel layouts: formats.h.
struct Shape {
  std::size_t block_columns, block_bytes;  // as stored
  std::size_t groups;                      // of a super-group
  std::size_t super_header, group_header;  // bytes of scales, for sixteen rows
  int bits;

  std::size_t group_bytes() const { return group_header + 64 * bits; }
  std::size_t super_bytes() const { return super_header + groups * group_bytes(); }
  std::size_t num_supers(std::size_t columns) const { return columns / (GROUP * groups); }
};

Shape shape_of(Format format) {
  switch (format) {
    case Format::q8_0: return {32, 34, 1, 0, 32, 8};
    case Format::q4_0: return {32, 18, 1, 0, 32, 4};
    case Format::q4_1: return {32, 20, 1, 0, 64, 4};
    case Format::q5_0: return {32, 22, 1, 0, 32, 5};
    case Format::q5_1: return {32, 24, 1, 0, 64, 5};
    case Format::q4_k: return {256, 144, 8, 64, 32, 4};
    case Format::q5_k: return {256, 176, 8, 64, 32, 5};
    case Format::q6_k: return {256, 210, 8, 32, 32, 6};
    default: return {1, 0, 1, 0, 0, 0};
  }
}

constexpr std::uint32_t LOW_NIBBLES = 0x0F0F0F0Fu, ONES = 0x01010101u, THREES = 0x03030303u;

std::uint32_t word_at(const std::uint8_t* bytes, int i) {
  std::uint32_t word;
  std::memcpy(&word, bytes + 4 * i, 4);
  return word;
}

void put_word(std::uint8_t* bytes, std::uint32_t word) { std::memcpy(bytes, &word, 4); }

// Four bits of a 32-value block's high bits, one per byte.
std::uint32_t spread(std::uint32_t bits) { return (bits & 1u) | (bits & 2u) << 7 | (bits & 4u) << 14 | (bits & 8u) << 21; }

// Quad i of one group as it is stored: four values, a byte each.
void quads_of_small(const std::uint8_t* values, const std::uint8_t* high, std::uint32_t (&quads)[8]) {
  const std::uint32_t bits = high ? word_at(high, 0) : 0;
  for (int i = 0; i < 4; ++i) {
    const std::uint32_t word = word_at(values, i);
    quads[i] = (word & LOW_NIBBLES) | spread(bits >> (4 * i)) << 4;
    quads[4 + i] = ((word >> 4) & LOW_NIBBLES) | spread(bits >> (16 + 4 * i)) << 4;
  }
}

void quads_of_4_or_5_k(const std::uint8_t* values, const std::uint8_t* high, int group, std::uint32_t (&quads)[8]) {
  for (int i = 0; i < 8; ++i) {
    quads[i] = (word_at(values + 32 * (group / 2), i) >> (4 * (group % 2))) & LOW_NIBBLES;
    if (high) quads[i] |= ((word_at(high, i) >> group) & ONES) << 4;
  }
}

void quads_of_6_k(const std::uint8_t* block, int group, std::uint32_t (&quads)[8]) {
  const int half = group / 4, quarter = group % 4;
  const std::uint8_t* low = block + 64 * half + 32 * (quarter % 2);
  const std::uint8_t* high = block + 128 + 32 * half;
  for (int i = 0; i < 8; ++i)
    quads[i] = ((word_at(low, i) >> (4 * (quarter / 2))) & LOW_NIBBLES) | ((word_at(high, i) >> (2 * quarter)) & THREES) << 4;
}

void read_quads(Format format, const std::uint8_t* block, int group, std::uint32_t (&quads)[8]) {
  switch (format) {
    case Format::q4_0: return quads_of_small(block + 2, nullptr, quads);
    case Format::q4_1: return quads_of_small(block + 4, nullptr, quads);
    case Format::q5_0: return quads_of_small(block + 6, block + 2, quads);
    case Format::q5_1: return quads_of_small(block + 8, block + 4, quads);
    case Format::q4_k: return quads_of_4_or_5_k(block + 16, nullptr, group, quads);
    case Format::q5_k: return quads_of_4_or_5_k(block + 48, block + 16, group, quads);
    case Format::q6_k: return quads_of_6_k(block, group, quads);
    default:
      for (int i = 0; i < 8; ++i) quads[i] = word_at(block + 2, i);
  }
}

// Writes one row's quads into the planes of its group.
void put_quads(int bits, const std::uint32_t (&quads)[8], std::size_t n, std::uint8_t* planes) {
  std::uint8_t* mine = planes + 4 * n;
  if (bits == 8) {
    for (int i = 0; i < 8; ++i) put_word(mine + 64 * i, quads[i]);
    return;
  }
  for (int i = 0; i < 4; ++i)
    put_word(mine + 64 * i, (quads[2 * i] & LOW_NIBBLES) | (quads[2 * i + 1] & LOW_NIBBLES) << 4);
  std::uint32_t fifth = 0, upper[2] = {0, 0};
  for (int i = 0; i < 8; ++i) {
    fifth |= ((quads[i] >> 4) & ONES) << i;
    upper[i / 4] |= ((quads[i] >> 4) & THREES) << (2 * (i % 4));
  }
  if (bits == 5) put_word(mine + 256, fifth);
  if (bits == 6) put_word(mine + 256, upper[0]), put_word(mine + 320, upper[1]);
}

void put_half(const std::uint8_t* from, std::size_t n, std::uint8_t* field) { std::memcpy(field + 2 * n, from, 2); }

// The six-bit scale and minimum of one group of Q4_K and Q5_K.
void k_scales(const std::uint8_t* packed, int group, std::uint8_t* scale, std::uint8_t* minimum) {
  if (group < 4) {
    *scale = packed[group] & 63;
    *minimum = packed[4 + group] & 63;
  } else {
    *scale = static_cast<std::uint8_t>((packed[4 + group] & 15) | (packed[group - 4] >> 6) << 4);
    *minimum = static_cast<std::uint8_t>((packed[4 + group] >> 4) | (packed[group] >> 6) << 4);
  }
}

void put_super_scales(Format format, const std::uint8_t* block, std::size_t n, std::uint8_t* super) {
  if (format == Format::q4_k || format == Format::q5_k) {
    put_half(block, n, super);
    put_half(block + 2, n, super + 32);
  } else if (format == Format::q6_k) {
    put_half(block + 208, n, super);
  }
}

void put_group_scales(Format format, const std::uint8_t* block, int group, std::size_t n, std::uint8_t* field) {
  switch (format) {
    case Format::q4_k:
    case Format::q5_k: return k_scales(block + 4, group, field + n, field + PANEL_ROWS + n);
    case Format::q6_k:
      field[n] = block[192 + 2 * group];
      field[PANEL_ROWS + n] = block[192 + 2 * group + 1];
      return;
    case Format::q4_1:
    case Format::q5_1: put_half(block + 2, n, field + 32); [[fallthrough]];
    default: put_half(block, n, field);
  }
}

// Panels of bfloat16, [K, 16].
std::uint16_t* bf16_panel(const Matrix& packed, std::size_t panel) {
  return reinterpret_cast<std::uint16_t*>(const_cast<std::uint8_t*>(packed.data)) + panel * PANEL_ROWS * packed.num_columns;
}

void pack_bf16(const Matrix& packed, const std::uint8_t* stored, std::size_t first, std::size_t last) {
  constexpr std::size_t AT_ONCE = 32;  // columns: a cache line of each row is read once
  const std::size_t columns = packed.num_columns;
  for (std::size_t panel = first; panel < last; ++panel) {
    std::uint16_t* to = bf16_panel(packed, panel);
    const std::size_t left = packed.num_rows - panel * PANEL_ROWS, present = left < PANEL_ROWS ? left : PANEL_ROWS;
    if (present < PANEL_ROWS) std::memset(to, 0, PANEL_ROWS * columns * 2);
    for (std::size_t k = 0; k < columns; k += AT_ONCE) {
      const std::size_t count = columns - k < AT_ONCE ? columns - k : AT_ONCE;
      for (std::size_t n = 0; n < present; ++n) {
        std::uint16_t part[AT_ONCE];
        std::memcpy(part, stored + ((panel * PANEL_ROWS + n) * columns + k) * 2, count * 2);
        for (std::size_t i = 0; i < count; ++i) to[(k + i) * PANEL_ROWS + n] = part[i];
      }
    }
  }
}

}  // namespace

std::size_t packed_bytes(Format format, std::size_t num_rows, std::size_t num_columns) {
  if (format == Format::bf16_panels) return (num_rows + PANEL_ROWS - 1) / PANEL_ROWS * PANEL_ROWS * num_columns * 2;
  const Shape shape = shape_of(format);
  if (shape.bits == 0 || num_columns == 0 || num_columns % shape.block_columns != 0) return 0;
  return (num_rows + PANEL_ROWS - 1) / PANEL_ROWS * shape.num_supers(num_columns) * shape.super_bytes();
}

void pack_panels(const Matrix& packed, const std::uint8_t* stored, std::size_t first, std::size_t last) {
  if (packed.format == Format::bf16_panels) return pack_bf16(packed, stored, first, last);
  const Shape shape = shape_of(packed.format);
  const std::size_t num_supers = shape.num_supers(packed.num_columns), row_bytes = num_supers * shape.block_bytes;
  std::uint8_t* to = const_cast<std::uint8_t*>(packed.data) + first * num_supers * shape.super_bytes();
  for (std::size_t panel = first; panel < last; ++panel)
    for (std::size_t s = 0; s < num_supers; ++s, to += shape.super_bytes()) {
      const std::size_t left = packed.num_rows - panel * PANEL_ROWS, present = left < PANEL_ROWS ? left : PANEL_ROWS;
      if (present < PANEL_ROWS) std::memset(to, 0, shape.super_bytes());
      for (std::size_t n = 0; n < present; ++n) {
        const std::uint8_t* block = stored + (panel * PANEL_ROWS + n) * row_bytes + s * shape.block_bytes;
        put_super_scales(packed.format, block, n, to);
        for (std::size_t g = 0; g < shape.groups; ++g) {
          std::uint8_t* group = to + shape.super_header + g * shape.group_bytes();
          std::uint32_t quads[8];
          read_quads(packed.format, block, static_cast<int>(g), quads);
          put_group_scales(packed.format, block, static_cast<int>(g), n, group);
          put_quads(shape.bits, quads, n, group + shape.group_header);
        }
      }
    }
}

namespace {

float half_at(const std::uint8_t* field, std::size_t n) {
  std::uint16_t half;
  std::memcpy(&half, field + 2 * n, 2);
  const float sign = half & 0x8000u ? -1.0f : 1.0f;
  const std::uint32_t exponent = (half >> 10) & 31u, fraction = half & 1023u;
  if (exponent == 0u) return sign * static_cast<float>(fraction) * 0x1p-24f;
  const std::uint32_t bits = (half & 0x8000u) << 16 | (exponent == 31u ? 255u : exponent + 112u) << 23 | fraction << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// Value k of row n of a group, before scales.
int quantum(int bits, const std::uint8_t* planes, std::size_t n, int k) {
  const int i = k / 4, at = static_cast<int>(4 * n) + k % 4;
  if (bits == 8) return static_cast<std::int8_t>(planes[64 * i + at]);
  int value = (planes[64 * (i / 2) + at] >> (4 * (i % 2))) & 15;
  if (bits == 5) value |= ((planes[256 + at] >> i) & 1) << 4;
  if (bits == 6) value |= ((planes[256 + 64 * (i / 4) + at] >> (2 * (i % 4))) & 3) << 4;
  return value;
}

float value_of(Format format, const std::uint8_t* super, const std::uint8_t* group, std::size_t n, int k, int q) {
  switch (format) {
    case Format::q8_0: return static_cast<float>(q) * half_at(group, n);
    case Format::q4_0: return static_cast<float>(q - 8) * half_at(group, n);
    case Format::q5_0: return static_cast<float>(q - 16) * half_at(group, n);
    case Format::q4_1:
    case Format::q5_1: return static_cast<float>(q) * half_at(group, n) + half_at(group + 32, n);
    case Format::q6_k: {
      const std::int8_t scale = static_cast<std::int8_t>(group[PANEL_ROWS * (k / 16) + n]);
      return static_cast<float>(q - 32) * (half_at(super, n) * static_cast<float>(scale));
    }
    default: {
      const float scale = half_at(super, n) * static_cast<float>(group[n]);
      return static_cast<float>(q) * scale - half_at(super + 32, n) * static_cast<float>(group[PANEL_ROWS + n]);
    }
  }
}

}  // namespace

void unpack_row(const Matrix& packed, std::size_t row, float* out) {
  if (packed.format == Format::bf16_panels) {
    const std::uint16_t* element = bf16_panel(packed, row / PANEL_ROWS) + row % PANEL_ROWS;
    for (std::size_t k = 0; k < packed.num_columns; ++k) {
      const std::uint32_t bits = static_cast<std::uint32_t>(element[k * PANEL_ROWS]) << 16;
      std::memcpy(out + k, &bits, sizeof bits);
    }
    return;
  }
  const Shape shape = shape_of(packed.format);
  const std::size_t num_supers = shape.num_supers(packed.num_columns), n = row % PANEL_ROWS;
  const std::uint8_t* super = packed.data + row / PANEL_ROWS * num_supers * shape.super_bytes();
  for (std::size_t s = 0; s < num_supers; ++s, super += shape.super_bytes())
    for (std::size_t g = 0; g < shape.groups; ++g) {
      const std::uint8_t* group = super + shape.super_header + g * shape.group_bytes();
      for (int k = 0; k < static_cast<int>(GROUP); ++k)
        *out++ = value_of(packed.format, super, group, n, k, quantum(shape.bits, group + shape.group_header, n, k));
    }
}

}  // namespace freehold
