#pragma once
// Counter-based random numbers: the state is a seed, a stream and a position, so it fits a
// checkpoint and any element can be drawn without drawing those before it.
#include <array>
#include <cstdint>

namespace entrain {

class Rng {
 public:
  Rng(uint64_t seed, uint64_t stream) : seed_(seed), stream_(stream) {}

  uint64_t next();                 // 64 uniform bits
  uint64_t below(uint64_t bound);  // uniform in [0, bound), unbiased
  double uniform();                // [0, 1)
  double normal();                 // mean 0, variance 1 (Box-Muller; two draws each)

  std::array<uint64_t, 3> state() const { return {seed_, stream_, position_}; }
  void restore(const std::array<uint64_t, 3>& s) { seed_ = s[0], stream_ = s[1], position_ = s[2]; }

 private:
  uint64_t seed_;
  uint64_t stream_;
  uint64_t position_ = 0;
};

}  // namespace entrain
