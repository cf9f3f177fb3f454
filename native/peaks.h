// What the machine's multipliers and memory give at most: loops that do nothing else. Kernels are held against them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace freehold {

enum class Arithmetic : int { float32 = 0, up_to_six_bits = 1, eight_bits = 2 };  // of weights, met by floats or int8

#ifdef FREEHOLD_FORM
namespace FREEHOLD_FORM {

// Multiplies and adds in registers, so many rounds on each thread. Returns the operations: two for each product.
double multiply_in_registers(Arithmetic, std::size_t num_rounds, int num_threads);

// Reads memory once, front to back.
void read_memory(const std::uint8_t* data, std::size_t num_bytes, int num_threads);

}  // namespace FREEHOLD_FORM
#endif

}  // namespace freehold
