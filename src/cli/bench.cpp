// entrain bench: speed of the training step (bench_train.cpp), of attention (bench_attention.cpp)
// and of decoding (bench_decode.cpp), next to what this machine gives, measured in the same minute.
#include "cli/bench.h"

#include <fmt/format.h>
#include <omp.h>

#include "core/gpu.h"

namespace entrain::cli {

std::string where(Device device) {
  return device == Device::cuda ? gpu::info().name
                                : fmt::format("{} threads", omp_get_max_threads());
}

void add_bench(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Measure speed on this machine");
  bench->require_subcommand(1);
  bench->footer(
      "Examples:\n  entrain bench train --batch 4 --tokens 1024\n"
      "  mpirun -np 2 entrain bench train --method dash --density 0.25 --shard-optimizer\n"
      "  entrain bench attention --shape B1,Hq32,Hkv2,D128,N16384 --density 0.25 0.125\n"
      "  entrain bench decode --context 98304 --batch 1 8 64 --density 0.0625");

  add_bench_train(*bench);
  add_bench_attention(*bench);
  add_bench_decode(*bench);
}

}  // namespace entrain::cli
