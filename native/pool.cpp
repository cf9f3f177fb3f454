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
    ++num_calls_;
    for (int member = 1; member < num_threads; ++member) {
      calls_[member].number.store(num_calls_, std::memory_order_release);
      calls_[member].number.notify_one();
    }
    function(team_, 0, argument);
    team_.barrier();
  }

 private:
  // The last call that a worker has a part in. Each has its own, so that a call wakes none but those that it needs.
  struct alignas(64) Call {
    std::atomic<std::uint32_t> number{0};
  };

  void start_worker() {
    const int member = ++num_workers_;
    std::thread([this, member] { serve(member); }).detach();
  }

  void serve(int member) {
    for (std::uint32_t seen = 0;;) {
      wait_for_change(calls_[member].number, seen, BETWEEN_CALLS);
      seen = calls_[member].number.load(std::memory_order_acquire);  // the next cannot begin without this member
      function_(team_, member, argument_);
      team_.barrier();
    }
  }

  std::mutex one_call_;
  int num_workers_ = 0;
  Team team_;
  TeamFunction function_ = nullptr;
  void* argument_ = nullptr;
  std::uint32_t num_calls_ = 0;
  Call calls_[MAX_THREADS];
};

// Never destroyed: its threads may outlive any destructor at the end of the process.
Pool* the_pool = new Pool;

// A forked child has none of the threads, so it starts anew.
[[maybe_unused]] const int fork_handler = pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });

}  // namespace

void Team::barrier() {
  // Both before the arrival: after it the others may be through, and the size that of the next call.
  const std::uint32_t phase = phase_.load(std::memory_order_relaxed);
  const int size = size_;
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
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
