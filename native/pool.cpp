#include "pool.h"

#include <pthread.h>

#include <mutex>
#include <thread>

#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace freehold {
namespace {

// How a waiting thread passes its time: it polls, then lets others run between its polls, then parks.
//
// Between calls it parks after some tens of microseconds, which is longer than the gap between two calls of a decode step
// and short enough to leave the processor to others where there is nothing to do. Within a call the others are at work
// and will come: waking a parked thread costs more than most waits, and a step has hundreds of them.
struct Patience {
  int polls, yields;
};
constexpr Patience BETWEEN_CALLS{4000, 0}, WITHIN_CALL{1000, 5000};

inline void pause() {
#if defined(__x86_64__) || defined(__i386__)
  _mm_pause();
#endif
}

// Waits until the value is no longer `old`.
void wait_for_change(std::atomic<std::uint32_t>& value, std::uint32_t old, Patience patience) {
  for (int poll = 0; poll < patience.polls; ++poll) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  for (int yield = 0; yield < patience.yields; ++yield) {
    if (value.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

class Pool {
 public:
  void run(int num_threads, TeamFunction function, void* argument) {
    const std::lock_guard<std::mutex> alone(one_call_);
    while (num_workers_ < num_threads - 1) start_worker();
    team_.size_ = num_threads;
    team_.cursor_.store(0, std::memory_order_relaxed);
    function_ = function;
    argument_ = argument;
    if (num_threads > 1) {
      call_.store((call_.load(std::memory_order_relaxed) / SIZES + 1) * SIZES + num_threads, std::memory_order_release);
      call_.notify_all();
    }
    function(team_, 0, argument);
    team_.barrier();
  }

 private:
  // A call's number and the size of its team, in one word: a worker that is late for a call it has no part in never
  // takes the size of the next.
  static constexpr std::uint32_t SIZES = MAX_THREADS + 1;

  void start_worker() {
    const int member = ++num_workers_;
    const std::uint32_t seen = call_.load(std::memory_order_relaxed);
    std::thread([this, member, seen] { serve(member, seen); }).detach();
  }

  void serve(int member, std::uint32_t seen) {
    for (;;) {
      wait_for_change(call_, seen, BETWEEN_CALLS);
      seen = call_.load(std::memory_order_acquire);
      if (member >= static_cast<int>(seen % SIZES)) continue;
      function_(team_, member, argument_);
      team_.barrier();
    }
  }

  std::mutex one_call_;
  int num_workers_ = 0;
  Team team_;
  TeamFunction function_ = nullptr;
  void* argument_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> call_{0};
};

// Never destroyed: its threads may outlive any destructor at the end of the process.
Pool* the_pool = new Pool;

// A forked child has none of the threads, so it starts anew.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });

}  // namespace

void Team::barrier() {
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
    arrived_.store(0, std::memory_order_relaxed);
    cursor_.store(0, std::memory_order_relaxed);
    phase_.store(phase + 1, std::memory_order_release);
    phase_.notify_all();
  } else {
    wait_for_change(phase_, phase, WITHIN_CALL);
  }
}

void run_team(int num_threads, TeamFunction function, void* argument) {
  the_pool->run(num_threads < MAX_THREADS ? num_threads : MAX_THREADS, function, argument);
}

}  // namespace freehold
