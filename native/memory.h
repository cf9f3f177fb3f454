// Where weights lie: in large pages, and on all memory nodes of the machine alike.
#pragma once

#include <cstddef>

namespace freehold {

// Asks this for a piece of memory that nothing was written to yet. A system that refuses changes nothing but the speed.
void place_weights(void* begin, std::size_t num_bytes);

}  // namespace freehold
