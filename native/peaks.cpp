#include "peaks.h"

#include "pool.h"
#include "simd.h"

namespace freehold::FREEHOLD_FORM {
namespace {

// Sums that do not wait for each other: enough to hide an instruction's latency, few enough for the registers.
#if defined(__AVX512F__)
constexpr int CHAINS = 10;
#else
constexpr int CHAINS = 6;
#endif
constexpr std::size_t BYTES_PER_CLAIM = 256 << 10;

// From here on the compiler takes it that somebody has read and written these values. Sums are not touched themselves,
// but copies of them: they would lie in memory all along.
template <typename Values>
inline void touch(Values& values) {
  asm volatile("" : : "r"(&values) : "memory");
}
template <typename Sum>
inline void use(const Sum (&sums)[CHAINS]) {
  Sum copies[CHAINS];
#pragma GCC unroll 16
  for (int chain = 0; chain < CHAINS; ++chain) copies[chain] = sums[chain];
  touch(copies);
}

void multiply_floats(std::size_t num_rounds) {
  float factors[2] = {0.5f, 1.0f}, starts[CHAINS * LANES] = {};  // unknown to the compiler, which would see equal chains
  touch(factors);
  touch(starts);
  const F32 factor = splat(factors[0]), term = splat(factors[1]);
  F32 sums[CHAINS];
#pragma GCC unroll 16
  for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = load(starts + chain * LANES);
  for (std::size_t round = 0; round < num_rounds; ++round)
#pragma GCC unroll 16
    for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = fma(sums[chain], factor, term);
  use(sums);
}

// `add` as the products use it, whose row element comes from memory each time.
template <typename Sum, typename Add>
void multiply_bytes(std::size_t num_rounds, Add&& add) {
  std::uint8_t stored[4 * LANES] = {1, 2, 3, 4};
  std::int32_t quads[CHAINS] = {};
  touch(stored);
  const Bytes weights = load_bytes(stored);
  Sum sums[CHAINS];
#pragma GCC unroll 16
  for (int chain = 0; chain < CHAINS; ++chain) sums[chain] = Sum{};
  for (std::size_t round = 0; round < num_rounds; ++round) {
    touch(quads);
#pragma GCC unroll 16
    for (int chain = 0; chain < CHAINS; ++chain) add(sums[chain], weights, quads[chain]);
  }
  use(sums);
}

}  // namespace

double multiply_in_registers(Arithmetic arithmetic, std::size_t num_rounds, int num_threads) {
  run_team(num_threads, [&](Team&, int) {
    switch (arithmetic) {
      case Arithmetic::float32: return multiply_floats(num_rounds);
      case Arithmetic::up_to_six_bits:
        return multiply_bytes<Sums>(num_rounds, [](Sums& s, Bytes w, std::int32_t q) { add_products(s, w, q); });
      case Arithmetic::eight_bits:
        return multiply_bytes<I32>(num_rounds, [](I32& s, Bytes w, std::int32_t q) { add_products_8(s, w, q); });
    }
  });
  const int products = arithmetic == Arithmetic::float32 ? LANES : 4 * LANES;
  return 2.0 * products * CHAINS * static_cast<double>(num_rounds) * num_threads;
}

void read_memory(const std::uint8_t* data, std::size_t num_bytes, int num_threads) {
  run_team(num_threads, [&](Team& team, int) {
    Bytes seen[4] = {};
    for (std::size_t begin; (begin = team.claim() * BYTES_PER_CLAIM) < num_bytes;) {
      const std::size_t end = begin + BYTES_PER_CLAIM < num_bytes ? begin + BYTES_PER_CLAIM : num_bytes;
      for (std::size_t i = begin; i + 256 <= end; i += 256) {
        read_ahead<256>(data + i);
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) seen[part] = seen[part] | load_bytes(data + i + 64 * part);
      }
    }
    touch(seen);
  });
}

}  // namespace freehold::FREEHOLD_FORM
