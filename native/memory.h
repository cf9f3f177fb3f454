// What the system is asked about memory: weights in large pages on all nodes alike, and no memory back that is wanted again.
#pragma once

#include <cstddef>

namespace freehold {

// Asks this for a piece of memory that nothing was written to yet. A system that refuses changes nothing but the speed.
void place_weights(void* begin, std::size_t num_bytes);

// Asks that what is freed from now on is kept for this process, up to 2 GiB at a time. A step of training frees and wants the same
// hundreds of megabytes each time, and the system would clear every page of it again.
void keep_freed_memory();

}  // namespace freehold
