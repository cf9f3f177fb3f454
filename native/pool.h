// The threads that every kernel shares: persistent, spinning briefly between calls, then parked.
//
// A kernel runs as a team: each member executes the same function, members take whole tiles by `claim` and meet at
// `barrier`. Which member computes a tile is left to chance, what the tile holds is not: a kernel reduces each output
// value within one tile in a fixed order, so the number of threads changes no bit.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace freehold {

constexpr int MAX_THREADS = 255;

class Team {
 public:
  int size() const { return size_; }
  // Returns the next tile of this phase, counted from 0; the caller stops at its own count.
  std::size_t claim() { return cursor_.fetch_add(1, std::memory_order_relaxed); }
  // Waits for all members, and starts the next phase.
  void barrier();

  int size_ = 1;  // written by the pool between calls alone
  alignas(64) std::atomic<std::size_t> cursor_{0};

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

using TeamFunction = void (*)(Team&, int member, void* argument);

// Runs the function on `num_threads` members, the caller being member 0, and returns when all are done. One call at a
// time: a second caller waits. Threads are started when first wanted and live as long as the process.
void run_team(int num_threads, TeamFunction function, void* argument);

template <typename Work>
void run_team(int num_threads, Work&& work) {
  run_team(
      num_threads, [](Team& team, int member, void* argument) { (*static_cast<Work*>(argument))(team, member); },
      const_cast<void*>(static_cast<const void*>(&work)));
}

}  // namespace freehold
