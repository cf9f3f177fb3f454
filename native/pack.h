// From a GGUF format to panels (matrix.h, formats.h), every value kept; done once, when a model is loaded.
#pragma once

#include "matrix.h"

namespace freehold {

// Bytes of a packed matrix; 0 where the format is plain or a row is no whole number of blocks.
std::size_t packed_bytes(Format format, std::size_t num_rows, std::size_t num_columns);

// Packs panels first to last - 1 of a matrix whose blocks lie at `stored`, row after row. Absent rows of the last panel
// become zeros.
void pack_panels(const Matrix& packed, const std::uint8_t* stored, std::size_t first, std::size_t last);

// The values of one row of a packed matrix, as the format's formula gives them in float32.
void unpack_row(const Matrix& packed, std::size_t row, float* out);

}  // namespace freehold
