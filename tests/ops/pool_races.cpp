// Teams of changing sizes, called from several threads, with tiles that depend on another member's: built with
// -fsanitize=thread by test_pool.py. Prints "ok" where every tile has been computed once.
#include <cstdio>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

constexpr long TILES = 64;

bool call(int num_threads, long salt) {
  std::vector<long> first(TILES, 0), second(TILES, 0);
  freehold::run_team(num_threads, [&](freehold::Team& team, int) {
    for (long tile; (tile = static_cast<long>(team.claim())) < TILES;) first[tile] += tile + salt;
    team.barrier();
    for (long tile; (tile = static_cast<long>(team.claim())) < TILES;) second[tile] += first[TILES - 1 - tile];
  });
  for (long tile = 0; tile < TILES; ++tile)
    if (second[tile] != TILES - 1 - tile + salt) return false;
  return true;
}

}  // namespace

int main() {
  std::atomic<bool> is_right{true};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 3; ++caller)
    callers.emplace_back([&, caller] {
      for (int i = 0; i < 300; ++i)
        if (!call(1 + (7 * i + caller) % 5, i)) is_right = false;
    });
  for (std::thread& caller : callers) caller.join();
  std::puts(is_right ? "ok" : "wrong");
}
