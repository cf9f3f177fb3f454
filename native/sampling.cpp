// Work of one row: a pass for the largest logit, one for an exponential of each, and one that looks for the likeliest,
// which alone are sorted. A row of 152,000 takes two thirds of a millisecond, nearly all of it the exponentials; at
// temperature 0 only the first pass is left. Rows go to threads.
#include "sampling.h"

#include <algorithm>
#include <cmath>

#include "phases.h"
#include "scratch.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Lanes carry the largest so far and where it was, as a float: exact below 2**24, far beyond any vocabulary.
std::size_t place_of_largest(const float* row, std::size_t width) {
  F32 most = splat(-__builtin_inff()), places = splat(0.0f);
  std::size_t i = 0;
  for (; i + LANES <= width; i += LANES) {
    const F32 values = load(row + i);
    places = where_less(most, values, splat(static_cast<float>(i)), places);
    most = where_less(most, values, values, most);
    if (has_nan(values)) break;
  }
  float lanes[LANES], starts[LANES];
  store(lanes, most);
  store(starts, places);
  std::size_t best = static_cast<std::size_t>(starts[0]);
  for (std::size_t lane = 1; lane < LANES && lane < width; ++lane) {
    const std::size_t place = static_cast<std::size_t>(starts[lane]) + lane;
    if (row[place] > row[best] || (row[place] == row[best] && place < best)) best = place;
  }
  for (; i < width; ++i)
    if (!(row[i] <= row[best])) {
      best = i;
      if (row[i] != row[i]) break;
    }
  return best;
}

// One row's distribution, unnormalised: the weight of the largest logit is 1.
class Distribution {
 public:
  Distribution(const Draw& draw, std::size_t width, float largest, double* weights, std::int32_t* ids)
      : draw_(draw), width_(width), weights_(weights), ids_(ids) {
    for (std::size_t i = 0; i < width; ++i) {
      weights[i] = std::exp((static_cast<double>(draw.logits[i]) - largest) / draw.temperature);
      sum_ += weights[i];
    }
  }

  std::int64_t token() {
    for (const double least : {1e-3, 1e-6, 1e-12, 0.0}) {  // seldom are the unlikely ones needed
      take_down_to(least);
      if (has_top_k() || least == 0.0) return of_kept(num_kept());
      const std::size_t kept = num_kept();
      if (draw_.top_k == 0 && kept < num_ids_) return of_kept(kept);
      if (draw_.top_k == 0 && is_unfiltered() && reaches(draw_.uniform * sum_)) return of_kept(kept);
    }
    return -1;  // the last round has returned
  }

 private:
  bool is_unfiltered() const { return draw_.top_p >= 1.0 && draw_.min_p <= 0.0; }
  bool has_top_k() const { return draw_.top_k > 0 && num_ids_ == static_cast<std::size_t>(draw_.top_k); }

  // Takes the ids whose weight is not below `least`, the likeliest first and of equal ones the lowest; at most top_k.
  void take_down_to(double least) {
    num_ids_ = 0;
    for (std::size_t i = 0; i < width_; ++i)
      if (weights_[i] >= least) ids_[num_ids_++] = static_cast<std::int32_t>(i);
    const float* logits = draw_.logits;
    std::sort(ids_, ids_ + num_ids_, [logits](std::int32_t a, std::int32_t b) {
      return logits[a] > logits[b] || (logits[a] == logits[b] && a < b);
    });
    if (draw_.top_k > 0 && num_ids_ >= static_cast<std::size_t>(draw_.top_k)) {
      num_ids_ = static_cast<std::size_t>(draw_.top_k);
      sum_ = 0.0;
      for (std::size_t i = 0; i < num_ids_; ++i) sum_ += weights_[ids_[i]];
    }
  }

  // How many of the ids taken top_p and min_p keep; all of them where their end has not been met.
  std::size_t num_kept() const {
    double before = 0.0;
    for (std::size_t i = 0; i < num_ids_; ++i) {
      const double weight = weights_[ids_[i]];
      if (i > 0 && !((draw_.top_p >= 1.0 || before / sum_ < draw_.top_p) && weight >= draw_.min_p)) return i;
      before += weight;
    }
    return num_ids_;
  }

  bool reaches(double target) const {
    double sum = 0.0;
    for (std::size_t i = 0; i < num_ids_; ++i) sum += weights_[ids_[i]];
    return sum > target;
  }

  std::int64_t of_kept(std::size_t num_kept) const {
    double total = 0.0;
    for (std::size_t i = 0; i < num_kept; ++i) total += weights_[ids_[i]];
    const bool is_all = is_unfiltered() && draw_.top_k == 0;  // also of those that were not taken
    const double target = draw_.uniform * (is_all ? sum_ : total);
    std::int32_t last = ids_[0];
    double sum = 0.0;
    for (std::size_t i = 0; i < num_kept; ++i) {
      if (weights_[ids_[i]] > 0.0) last = ids_[i];
      sum += weights_[ids_[i]];
      if (sum > target) break;
    }
    return last;
  }

  const Draw& draw_;
  std::size_t width_, num_ids_ = 0;
  double* weights_;
  std::int32_t* ids_;
  double sum_ = 0.0;
};

std::int64_t token_of(const Draw& draw, std::size_t width) {
  const std::size_t place = place_of_largest(draw.logits, width);
  const float largest = draw.logits[place];
  if (draw.temperature == 0.0 || !std::isfinite(largest)) return static_cast<std::int64_t>(place);
  Scratch& memory = scratch();
  memory.reset();
  double* weights = memory.take<double>(width);
  return Distribution(draw, width, largest, weights, memory.take<std::int32_t>(width)).token();
}

}  // namespace

void sample(const Draw* draws, std::size_t num_rows, std::size_t width, std::int64_t* tokens, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    for_each(team, num_rows, 1, [&](std::size_t m) { tokens[m] = token_of(draws[m], width); });
  });
}

}  // namespace freehold::FREEHOLD_FORM
