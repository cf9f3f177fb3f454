// Products of packed panels with quantized rows: the inner loop of decode and of prefill.
//
// Per group of 32 columns, row m and panel row n:
//
//   products = sum over the group of (q - zero) * values         exact, 32-bit integers
//   acc      = fma(products, scale_n * scale_m, acc)             float32, groups in order from 0
//   acc      = fma(minimum_n, scale_m * sum of values, acc)      where the format has minimums
//
// That order depends on K alone, and the integers on nothing, so all forms and all numbers of rows give the same bits.
//
// Bytes: a panel's own, once; for more than a few rows it is unpacked into L1 a block of columns at a time and met by all
// of them. Operations: 16 x 32 products a group and row, in AVX2 8 x 2 (multiply, add) and about 8 more; decode
// is bound by memory, prefill by the multipliers' rate.
#include "linear.h"

#include <type_traits>

#include "formats.h"

namespace freehold::FREEHOLD_FORM {
namespace {

constexpr std::size_t ROWS_AT_ONCE = 6;
// Rows that meet a panel as it lies, without blocks; for more, unpacking it first costs less than doing so in the inner
// loop. Eight bits are never unpacked.
constexpr int few_rows_of(int bits) { return bits == 8 ? 4 : 2; }
// Groups that tiles of rows meet one after another. Many take L1 (32 groups, at most 22 KB). A few rows are through with
// a block soon, so it is small: memory then reads the next while they are at it.
constexpr std::size_t BLOCK_GROUPS = 32, SMALL_BLOCK_GROUPS = 8, SMALL_BLOCK_ROWS = 12;

inline std::int32_t quad_of(const RowGroup& row, int i) {
  std::int32_t quad;
  std::memcpy(&quad, row.values + 4 * i, 4);
  return quad;
}

// A panel's block unpacked: bytes per value, scales in float32. It reads as `Format` does.
template <typename Format>
struct Unpacked {
  static constexpr int bits = Format::bits;
  static constexpr int zero = Format::zero;
  static constexpr bool lies_in_memory = false;
  struct S {
    static constexpr std::size_t groups = 1, super_bytes = 0;
    static constexpr bool has_minimum = Format::S::has_minimum;
    static constexpr int scales_per_group = Format::S::scales_per_group;
    static F32 scale(const std::uint8_t*, const std::uint8_t* group, int half) {
      return load(reinterpret_cast<const float*>(group) + PANEL_ROWS * half);
    }
    static F32 minimum(const std::uint8_t*, const std::uint8_t* group) {
      return load(reinterpret_cast<const float*>(group) + PANEL_ROWS);
    }
  };
  static constexpr std::size_t scale_bytes = 64 * (S::scales_per_group + (S::has_minimum ? 1 : 0));
  static constexpr std::size_t group_bytes = scale_bytes + 512;
  static constexpr std::size_t super_bytes = group_bytes;

  template <int i>
  static Bytes quad(const std::uint8_t* group) {
    return load_bytes(group + scale_bytes + 64 * i);
  }
};

template <typename Format, int i = 0>
inline void unpack_quads(const std::uint8_t* group, std::uint8_t* to) {
  store_bytes(to + 64 * i, Format::template quad<i>(group));
  if constexpr (i < 7) unpack_quads<Format, i + 1>(group, to);
}

template <typename Format>
void unpack(const std::uint8_t* panel, std::size_t num_supers, std::uint8_t* to) {
  using S = typename Format::S;
  for (std::size_t s = 0; s < num_supers; ++s) {
    const std::uint8_t* super = panel + s * Format::super_bytes;
    for (std::size_t g = 0; g < S::groups; ++g) {
      const std::uint8_t* group = super + S::super_bytes + g * Format::group_bytes;
      read_ahead<Format::group_bytes>(group);
      float* scales = reinterpret_cast<float*>(to);
      for (int half = 0; half < S::scales_per_group; ++half)
        store(scales + PANEL_ROWS * half, S::scale(super, group, half));
      if constexpr (S::has_minimum) store(scales + PANEL_ROWS, S::minimum(super, group));
      unpack_quads<Format>(group, to + Unpacked<Format>::scale_bytes);
      to += Unpacked<Format>::group_bytes;
    }
  }
}

template <typename Format, int rows, int first, int i, int stop>
inline void add_partial(const std::uint8_t* group, const RowGroup* const* row, Sums* partial) {
  const Bytes weights = Format::template quad<i>(group);
  for (int m = 0; m < rows; ++m) {
    if constexpr (i == first) partial[m] = products(weights, quad_of(*row[m], i));
    else add_products(partial[m], weights, quad_of(*row[m], i));
  }
  if constexpr (i + 1 < stop) add_partial<Format, rows, first, i + 1, stop>(group, row, partial);
}

// Adds quads first to last - 1 of one group to each row's integers.
template <typename Format, int rows, int first, int last>
inline void add_quads(const std::uint8_t* group, const RowGroup* const* row, I32* sums) {
  if constexpr (Format::bits == 8) {
    const Bytes weights = Format::template quad<first>(group);
    for (int m = 0; m < rows; ++m) add_products_8(sums[m], weights, quad_of(*row[m], first));
    if constexpr (first + 1 < last) add_quads<Format, rows, first + 1, last>(group, row, sums);
  } else {
    constexpr int most = quads_per_sum(Format::bits);
    constexpr int stop = first + most < last ? first + most : last;
    Sums partial[rows];
    add_partial<Format, rows, first, first, stop>(group, row, partial);
    for (int m = 0; m < rows; ++m) sums[m] = sums[m] + finished(partial[m]);
    if constexpr (stop < last) add_quads<Format, rows, stop, last>(group, row, sums);
  }
}

template <typename Format, int rows>
inline void add_group(const std::uint8_t* super, const std::uint8_t* group, const RowGroup* const* row, F32* acc) {
  using S = typename Format::S;
  constexpr int parts = S::scales_per_group, quads = 8 / parts;
  I32 sums[parts][rows];
  for (int m = 0; m < rows; ++m) {  // a zero point takes off zero times the sum of the row's values
    const I32 all = splat_int(row[m]->sum), half = splat_int(row[m]->first_half);
    sums[0][m] = times_minus<Format::zero>(parts == 1 ? all : half);
    if constexpr (parts == 2) sums[1][m] = times_minus<Format::zero>(all - half);
  }
  add_quads<Format, rows, 0, quads>(group, row, sums[0]);
  if constexpr (parts == 2) add_quads<Format, rows, quads, 8>(group, row, sums[1]);
  for (int part = 0; part < parts; ++part) {
    const F32 scale = S::scale(super, group, part);
    for (int m = 0; m < rows; ++m) acc[m] = fma(widened(sums[part][m]), scale * splat(row[m]->scale), acc[m]);
  }
  if constexpr (S::has_minimum) {
    const F32 minimum = S::minimum(super, group);
    for (int m = 0; m < rows; ++m) {
      acc[m] = fma(minimum, splat(row[m]->scale) * widened(splat_int(row[m]->sum)), acc[m]);
    }
  }
}

// Adds the columns of `num_supers` super-groups to acc, for rows that start at the same column.
template <typename Format, int rows>
void add_supers(const std::uint8_t* panel, std::size_t num_supers, const RowGroup* const* start, F32* total) {
  using S = typename Format::S;
  const RowGroup* row[rows];
  F32 acc[rows];
  for (int m = 0; m < rows; ++m) row[m] = start[m], acc[m] = total[m];
  for (std::size_t s = 0; s < num_supers; ++s) {
    const std::uint8_t* super = panel + s * Format::super_bytes;
    for (std::size_t g = 0; g < S::groups; ++g) {
      const std::uint8_t* group = super + S::super_bytes + g * Format::group_bytes;
      if constexpr (Format::lies_in_memory) read_ahead<Format::group_bytes>(group);
      add_group<Format, rows>(super, group, row, acc);
      for (int m = 0; m < rows; ++m) ++row[m];
    }
  }
  for (int m = 0; m < rows; ++m) total[m] = acc[m];
}

// `add_supers` on up to `rows` rows whose sums so far are in out.
template <typename Format, int rows>
void add_rows(const std::uint8_t* panel, std::size_t num_supers, const RowGroup* const* row, std::size_t count,
              float* out, std::size_t stride, bool is_first) {
  if constexpr (rows > 0) {
    if (count < rows) return add_rows<Format, rows - 1>(panel, num_supers, row, count, out, stride, is_first);
    F32 total[rows];
    for (int m = 0; m < rows; ++m) total[m] = is_first ? splat(0.0f) : load(out + m * stride);
    add_supers<Format, rows>(panel, num_supers, row, total);
    for (int m = 0; m < rows; ++m) store(out + m * stride, total[m]);
  }
}

template <typename Format>
void few_rows(const PanelCall& call, const std::uint8_t* panel, std::size_t num_supers) {
  constexpr int most = few_rows_of(Format::bits);
  const RowGroup* row[most];
  for (std::size_t m = 0; m < call.num_rows; ++m) row[m] = static_cast<const RowGroup*>(call.rows[m]);
  add_rows<Format, most>(panel, num_supers, row, call.num_rows, call.out, call.stride, true);
}

template <typename Format>
void many_rows(const PanelCall& call, const std::uint8_t* panel, std::size_t num_supers) {
  constexpr std::size_t groups = Format::S::groups;
  constexpr bool unpacks = Format::bits != 8;
  using Met = std::conditional_t<unpacks, Unpacked<Format>, Format>;
  const std::size_t most = (unpacks && call.num_rows <= SMALL_BLOCK_ROWS ? SMALL_BLOCK_GROUPS : BLOCK_GROUPS) / groups;
  const std::size_t height = tile_height(call.num_rows, ROWS_AT_ONCE);
  alignas(64) std::uint8_t unpacked[unpacks ? BLOCK_GROUPS * Met::group_bytes : 1];
  for (std::size_t s = 0; s < num_supers; s += most) {
    const std::size_t here = s + most < num_supers ? most : num_supers - s;
    const std::uint8_t* block = panel + s * Format::super_bytes;
    if constexpr (unpacks) {
      unpack<Format>(block, here, unpacked);
      block = unpacked;
    }
    for (std::size_t m = 0; m < call.num_rows; m += height) {
      const std::size_t count = m + height < call.num_rows ? height : call.num_rows - m;
      const RowGroup* row[ROWS_AT_ONCE];
      for (std::size_t i = 0; i < count; ++i) row[i] = static_cast<const RowGroup*>(call.rows[m + i]) + s * groups;
      add_rows<Met, static_cast<int>(ROWS_AT_ONCE)>(block, here * groups / Met::S::groups, row, count,
                                                    call.out + m * call.stride, call.stride, s == 0);
    }
  }
}

template <typename Format>
void packed_product(const PanelCall& call) {
  const std::size_t num_supers = call.matrix->num_columns / (GROUP * Format::S::groups);
  const std::uint8_t* panel = call.matrix->data + call.panel * num_supers * Format::super_bytes;
  if (call.num_rows <= few_rows_of(Format::bits)) return few_rows<Format>(call, panel, num_supers);
  many_rows<Format>(call, panel, num_supers);
}

}  // namespace

void multiply_quantized(const PanelCall& call) {
  switch (call.matrix->format) {
    case Format::q8_0: return packed_product<Q8_0>(call);
    case Format::q4_0: return packed_product<Q4_0>(call);
    case Format::q4_1: return packed_product<Q4_1>(call);
    case Format::q5_0: return packed_product<Q5_0>(call);
    case Format::q5_1: return packed_product<Q5_1>(call);
    case Format::q4_k: return packed_product<Q4_K>(call);
    case Format::q5_k: return packed_product<Q5_K>(call);
    case Format::q6_k: return packed_product<Q6_K>(call);
    default: return;  // the others are linear_float.cpp's
  }
}

}  // namespace freehold::FREEHOLD_FORM
