// Memory that a call works in: taken piece by piece, all given back at once, kept for the next call.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace freehold {

class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  ~Scratch() { release(); }

  // Returns room for `count` elements, aligned to a cache line, not initialised; throws std::bad_alloc.
  template <typename T>
  T* take(std::size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

  // Takes everything back. Where a call did not fit into one piece, the next finds one piece that is large enough.
  void reset();

 private:
  void* take_bytes(std::size_t bytes);
  void release();

  static constexpr int MAX_PIECES = 32;
  struct Piece {
    unsigned char* begin;
    std::size_t bytes;
  } pieces_[MAX_PIECES] = {};
  int num_pieces_ = 0;
  std::size_t used_ = 0;   // of the last piece
  std::size_t total_ = 0;  // of this call
};

// The scratch of the calling thread.
Scratch& scratch();

}  // namespace freehold
