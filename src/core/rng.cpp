#include "core/rng.h"

#include <cmath>
#include <numbers>

namespace entrain {
namespace {

// Philox4x32-10 (Salmon et al., SC 2011), two of its four words.
uint64_t philox(uint64_t key, uint64_t high, uint64_t low) {
  uint32_t x0 = static_cast<uint32_t>(low), x1 = static_cast<uint32_t>(low >> 32);
  uint32_t x2 = static_cast<uint32_t>(high), x3 = static_cast<uint32_t>(high >> 32);
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * x0, b = uint64_t{0xCD9E8D57} * x2;
    const uint32_t y0 = static_cast<uint32_t>(b >> 32) ^ x1 ^ k0;
    const uint32_t y2 = static_cast<uint32_t>(a >> 32) ^ x3 ^ k1;
    x1 = static_cast<uint32_t>(b), x3 = static_cast<uint32_t>(a), x0 = y0, x2 = y2;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
  return uint64_t{x1} << 32 | x0;
}

}  // namespace

uint64_t Rng::next() {
  return philox(seed_, stream_, position_++);
}

uint64_t Rng::below(uint64_t bound) {
  const uint64_t limit = UINT64_MAX - UINT64_MAX % bound;  // draws at or above it would be biased
  uint64_t x = next();
  while (x >= limit) x = next();
  return x % bound;
}

double Rng::uniform() {
  return static_cast<double>(next() >> 11) * 0x1.0p-53;
}

double Rng::normal() {
  const double u = 1.0 - uniform(), v = uniform();
  return std::sqrt(-2.0 * std::log(u)) * std::cos(2.0 * std::numbers::pi * v);
}

}  // namespace entrain
