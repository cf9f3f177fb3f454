#include "memory.h"

#include <sys/mman.h>
#ifdef __GLIBC__
#include <malloc.h>
#endif
#ifdef __linux__
#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <climits>
#include <cstdint>

namespace freehold {

namespace {

// Threads take panels as they come, so no node is the right one for any of them: pages that go to all nodes in turn give
// each node's memory the same share of the reading. Plain system calls, for libnuma would be one library more for two.
void interleave([[maybe_unused]] void* first, [[maybe_unused]] std::size_t num_bytes) {
#ifdef SYS_mbind
  constexpr unsigned long MAX_NODES = 1024, WORD_BITS = 8 * sizeof(unsigned long);
  unsigned long nodes[MAX_NODES / WORD_BITS] = {};  // that this process may use
  if (syscall(SYS_get_mempolicy, nullptr, nodes, MAX_NODES, nullptr, MPOL_F_MEMS_ALLOWED) == 0)
    syscall(SYS_mbind, first, num_bytes, MPOL_INTERLEAVE, nodes, MAX_NODES, 0);
#endif
}

}  // namespace

void place_weights(void* begin, std::size_t num_bytes) {
  constexpr std::uintptr_t PAGE = 4096;
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::uintptr_t first = (address + PAGE - 1) / PAGE * PAGE, end = (address + num_bytes) / PAGE * PAGE;
  if (end <= first) return;
#ifdef MADV_HUGEPAGE
  madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
  interleave(reinterpret_cast<void*>(first), end - first);
}

void keep_freed_memory() {
#ifdef M_MMAP_THRESHOLD
  mallopt(M_MMAP_THRESHOLD, INT_MAX);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
#endif
}

}  // namespace freehold
