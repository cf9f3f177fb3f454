#include "scratch.h"

#include <new>

namespace freehold {
namespace {

constexpr std::size_t LINE = 64, FIRST_BYTES = 1 << 20;

}  // namespace

void* Scratch::take_bytes(std::size_t bytes) {
  bytes = (bytes + LINE - 1) / LINE * LINE;
  if (num_pieces_ == 0 || used_ + bytes > pieces_[num_pieces_ - 1].bytes) {
    if (num_pieces_ == MAX_PIECES) throw std::bad_alloc();
    const std::size_t last = num_pieces_ ? 2 * pieces_[num_pieces_ - 1].bytes : FIRST_BYTES;
    const std::size_t wanted = bytes > last ? bytes : last;
    void* begin = std::aligned_alloc(LINE, wanted);
    if (!begin) throw std::bad_alloc();
    pieces_[num_pieces_++] = {static_cast<unsigned char*>(begin), wanted};
    used_ = 0;
  }
  void* taken = pieces_[num_pieces_ - 1].begin + used_;
  used_ += bytes;
  total_ += bytes;
  return taken;
}

void Scratch::reset() {
  if (num_pieces_ > 1) {
    const std::size_t wanted = total_;
    release();
    void* begin = std::aligned_alloc(LINE, wanted);
    if (begin) pieces_[num_pieces_++] = {static_cast<unsigned char*>(begin), wanted};
  }
  used_ = total_ = 0;
}

void Scratch::release() {
  for (int i = 0; i < num_pieces_; ++i) std::free(pieces_[i].begin);
  num_pieces_ = 0;
  used_ = 0;
}

Scratch& scratch() {
  thread_local Scratch mine;
  return mine;
}

}  // namespace freehold
