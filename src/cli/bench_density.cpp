#include "cli/bench_density.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "kernels/kernels.h"

namespace entrain::cli {

ReadCounters::Read ReadCounters::during(const std::function<void()>& forward) {
  const Tensor fields = read_.host();
  std::fill_n(fields.ptr<double>(), fields.numel(), 0.0);
  read_.upload();
  forward();
  read_.download();
  Read sum{};
  for (int64_t i = 0; i < fields.numel(); i += read_fields) {
    sum.pairs += fields.ptr<double>()[i + read_pairs];
    sum.causal += fields.ptr<double>()[i + read_causal];
    sum.flops += fields.ptr<double>()[i + read_flops];
  }
  return sum;
}

double seek(double* gamma, double target, const std::function<double()>& density) {
  double low = 1e-3, high = 1e4, found = 0;
  for (int i = 0; i < 40; ++i) {
    *gamma = std::sqrt(low * high);
    found = density();
    if (std::abs(found / target - 1) < 0.01) break;
    (found > target ? low : high) = *gamma;
  }
  return found;
}

double union_factor(Tensor mask, int64_t block, int64_t tile) {
  Mirror mirror(mask);
  mirror.download();
  const uint64_t* bits = mirror.host().ptr<uint64_t>();
  const int64_t sequences = mask[0] * mask[1], N = mask[2], words = mask[3];
  const int64_t tiles = (N + tile - 1) / tile;
  double sum = 0;
#pragma omp parallel for collapse(2) reduction(+ : sum)
  for (int64_t s = 0; s < sequences; ++s) {
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t first = t * tile, last = std::min(N, first + tile);
      int64_t together = 0, own = 0;
      for (int64_t w = 0; w < words; ++w) {
        uint64_t any = 0;
        for (int64_t i = first; i < last; ++i) {
          const int64_t seen = i / block + 1 - 64 * w;  // of this word's blocks
          if (seen <= 0) continue;
          uint64_t word = bits[(s * N + i) * words + w];
          if (seen < 64) word &= (uint64_t{1} << seen) - 1;
          own += std::popcount(word);
          any |= word;
        }
        together += std::popcount(any);
      }
      // A tile that attends nothing has nothing to share.
      sum +=
          own == 0 ? 1 : static_cast<double>(together * (last - first)) / static_cast<double>(own);
    }
  }
  return sum / static_cast<double>(sequences * tiles);
}

}  // namespace entrain::cli
