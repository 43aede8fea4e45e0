// InfLLM-V2: the choice of blocks against a direct one, and the method's gradients.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <numeric>
#include <vector>

#include "attention/attention.h"
#include "core/rng.h"
#include "kernels/kernels.h"

namespace entrain {
namespace {

const Kernels<Device::cpu> kernels;

struct Dims {
  int64_t B, Hq, Hkv, N, D;
};

/// An owned f64 tensor.
struct Array {
  explicit Array(Shape shape)
      : values(static_cast<size_t>(shape.numel())),
        tensor(Tensor::of(values.data(), shape, DType::f64)) {}
  Array(Shape shape, uint64_t stream) : Array(shape) {
    Rng rng(7, stream);
    for (double& x : values) x = rng.normal();
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  std::vector<double> values;
  Tensor tensor;
};

struct Inputs {
  explicit Inputs(const Dims& n)
      : q({n.B, n.Hq, n.N, n.D}, 1), k({n.B, n.Hkv, n.N, n.D}, 2), v({n.B, n.Hkv, n.N, n.D}, 3) {}

  Array q, k, v;
};

int64_t blocks_of(const Dims& n, const BlockSelection& s) {
  return (n.N + s.block - 1) / s.block;
}

/// The kernels' choice; reads, if given, gets the windows read per kv head.
std::vector<uint64_t> choose(const Dims& n, const BlockSelection& s, const Inputs& in,
                             std::vector<double>* reads = nullptr) {
  const int64_t words = (blocks_of(n, s) + 63) / 64;
  std::vector<uint64_t> mask(static_cast<size_t>(n.B * n.Hkv * n.N * words), ~uint64_t{0});
  const Array pooled({n.B, n.Hkv, s.windows(n.N), n.D}), read({n.Hkv, read_fields});
  kernels.pool_runs(in.k.tensor, s.runs(), pooled.tensor);
  const BlockSet blocks{.mask = Tensor::of(mask.data(), {n.B, n.Hkv, n.N, words}, DType::u64)};
  kernels.select_blocks(in.q.tensor, pooled.tensor, s, blocks, {}, read.tensor);
  for (int64_t r = 0; reads && r < n.Hkv; ++r) {
    reads->push_back(read.values[static_cast<size_t>(r * read_fields + read_router)]);
  }
  return mask;
}

/// The definition, one query at a time: every window, every block, a full sort.
std::vector<uint64_t> choose_directly(const Dims& n, const BlockSelection& s, const Inputs& in) {
  const int64_t M = blocks_of(n, s), words = (M + 63) / 64, g = n.Hq / n.Hkv;
  std::vector<uint64_t> mask(static_cast<size_t>(n.B * n.Hkv * n.N * words));
  for (int64_t head = 0; head < n.B * n.Hkv; ++head) {
    const double* k = in.k.values.data() + head * n.N * n.D;
    for (int64_t i = 0; i < n.N; ++i) {
      std::vector<std::pair<int64_t, double>> windows;  // first token, weight
      for (int64_t begin = 0; begin + s.length - 1 <= i; begin += s.stride) {
        windows.emplace_back(begin, 0);
      }
      for (int64_t h = 0; h < g; ++h) {
        const double* q = in.q.values.data() + ((head * g + h) * n.N + i) * n.D;
        std::vector<double> p;
        for (const auto& [begin, weight] : windows) {
          double z = 0;
          for (int64_t t = begin; t < begin + s.length; ++t) {
            for (int64_t d = 0; d < n.D; ++d) z += q[d] * k[t * n.D + d];
          }
          p.push_back(std::exp(z / double(s.length) / std::sqrt(double(n.D))));
        }
        const double sum = std::accumulate(p.begin(), p.end(), 0.0);
        for (size_t m = 0; m < p.size(); ++m) windows[m].second += p[m] / sum;
      }
      const int64_t own = i / s.block;
      std::vector<double> score(static_cast<size_t>(own + 1));
      std::vector<size_t> order(score.size());
      std::iota(order.begin(), order.end(), 0);
      for (int64_t c = 0; c <= own; ++c) {
        double& best = score[static_cast<size_t>(c)];
        for (const auto& [begin, weight] : windows) {
          const bool overlap = begin < (c + 1) * s.block && c * s.block < begin + s.length;
          if (overlap) best = std::max(best, weight);
        }
        if (c < s.init_blocks || c > own - s.local_blocks) best = 1e30;
      }
      std::ranges::stable_sort(order, [&](size_t a, size_t b) { return score[a] > score[b]; });
      order.resize(std::min(order.size(), static_cast<size_t>(s.topk)));
      uint64_t* bits = mask.data() + (head * n.N + i) * words;
      for (const size_t c : order) bits[c / 64] |= uint64_t{1} << (c % 64);
    }
  }
  return mask;
}

TEST(InfLlmV2, ChoosesWhatTheDefinitionDoes) {
  const std::pair<Dims, BlockSelection> cases[] = {
      {{1, 2, 1, 64, 16}, {64, 2, 1, 1, 32, 16}},  {{2, 4, 2, 200, 8}, {16, 5, 1, 2, 8, 4}},
      {{1, 4, 1, 1100, 4}, {16, 7, 1, 2, 32, 16}},  // several tiles, masks of two words
      {{1, 1, 1, 90, 4}, {8, 3, 0, 1, 8, 8}},       // windows side by side
      {{1, 3, 3, 131, 6}, {10, 4, 2, 1, 7, 3}},     // nothing divides anything
      {{1, 2, 2, 120, 4}, {4, 6, 0, 1, 3, 9}},      // gaps: some blocks have no window
      {{1, 2, 1, 120, 4}, {8, 4, 0, 0, 16, 8}},     // nothing forced, not even the own block
      {{1, 2, 1, 20, 4}, {4, 2, 0, 1, 32, 16}},     // no window at all: the lowest blocks
      {{1, 2, 1, 100, 4}, {8, 1000, 1, 2, 8, 4}},   // more than there are
      {{1, 2, 1, 100, 4}, {8, 3, 1, 2, 8, 4}},      // forced blocks only
      {{1, 2, 1, 100, 4}, {8, 2, 2, 3, 8, 4}},      // not even those: the first of them
      {{1, 2, 1, 100, 4}, {8, 9, 50, 1, 8, 4}},     // more forced than a query can have
      {{1, 2, 1, 1, 4}, {64, 16, 1, 2, 32, 16}},
  };
  for (const auto& [n, s] : cases) {
    const Inputs in(n);
    EXPECT_EQ(choose(n, s, in), choose_directly(n, s, in))
        << "N " << n.N << " block " << s.block << " topk " << s.topk;
  }
}

TEST(InfLlmV2, GivesTiesToTheLowerBlock) {
  const Dims n{1, 2, 1, 103, 5};
  const BlockSelection s{8, 4, 0, 1, 8, 4};
  Inputs in(n);
  for (size_t i = 5; i < in.k.values.size(); ++i) in.k.values[i] = in.k.values[i - 5];
  const std::vector<uint64_t> mask = choose(n, s, in);
  for (int64_t i = 0; i < n.N; ++i) {
    const int64_t own = i / s.block;
    uint64_t expected = uint64_t{1} << own;
    for (int64_t c = 0; c < std::min<int64_t>(3, own); ++c) expected |= uint64_t{1} << c;
    EXPECT_EQ(mask[static_cast<size_t>(i)], expected) << "query " << i;
  }
}

TEST(InfLlmV2, CountsTheWindowsThatQueriesSee) {
  const Dims n{2, 4, 2, 50, 4};
  std::vector<double> reads;
  choose(n, {8, 4, 1, 2, 16, 8}, Inputs(n), &reads);
  double seen = 0;
  for (int i = 0; i < 50; ++i) {
    for (int begin = 0; begin + 15 <= i; begin += 8) ++seen;
  }
  EXPECT_EQ(reads, std::vector<double>(2, 2 * seen));  // both sequences
}

TEST(InfLlmV2, SurvivesNotANumber) {
  const Dims n{1, 2, 1, 300, 4};
  const BlockSelection s{8, 5, 1, 2, 8, 4};
  Inputs in(n);
  std::fill(in.k.values.begin() + 200, in.k.values.begin() + 600, std::nan(""));
  const std::vector<uint64_t> mask = choose(n, s, in);
  EXPECT_EQ(std::popcount(mask[299]), 5);
}

struct Results {
  std::vector<double> o, dq, dk, dv, read;
  bool operator==(const Results&) const = default;
};

/// The method's forward and backward pass on a tape, dout the gradient of its output.
Results run_method(const Dims& n, const AttentionConfig& config, const Inputs& in,
                   const Array& dout) {
  const auto method = make_attention(config);
  EXPECT_TRUE(method->params({n.Hq, n.Hkv, n.D}).empty());
  const Array o(in.q.tensor.shape), dq(in.q.tensor.shape), dk(in.k.tensor.shape),
      dv(in.v.tensor.shape), read({n.Hkv, read_fields});
  TapeMemory memory(Device::cpu);
  for (const bool committed : {false, true}) {
    if (committed) memory.commit();
    Tape tape(memory, {.dtype = DType::f64, .training = true});
    method->record(tape,
                   {.q = {in.q.tensor, dq.tensor},
                    .k = {in.k.tensor, dk.tensor},
                    .v = {in.v.tensor, dv.tensor},
                    .projected = {},
                    .params = {},
                    .read = read.tensor},
                   {o.tensor, dout.tensor});
    if (!committed) continue;
    tape.forward();
    tape.backward();
  }
  return {o.values, dq.values, dk.values, dv.values, read.values};
}

const AttentionConfig small{.method = "infllmv2",
                            .init_blocks = 1,
                            .local_blocks = 1,
                            .block = 8,
                            .topk = 3,
                            .l = 8,
                            .d = 4};

TEST(InfLlmV2, GradientsAreThoseOfAttentionOverTheChosenBlocks) {
  const Dims n{1, 4, 2, 45, 6};
  const Inputs in(n);
  const Array dout(in.q.tensor.shape, 4);
  std::vector<uint64_t> mask = choose(n, {8, 3, 1, 1, 8, 4}, in);

  // <o, dout> by the definition, over the blocks chosen above whatever the inputs become.
  auto loss = [&] {
    double sum = 0;
    for (int64_t h = 0; h < n.Hq; ++h) {
      const int64_t r = h / (n.Hq / n.Hkv);
      for (int64_t i = 0; i < n.N; ++i) {
        double weights = 0, dots = 0;
        for (int64_t j = 0; j <= i; ++j) {
          if (!(mask[static_cast<size_t>(r * n.N + i)] >> (j / 8) & 1)) continue;
          double z = 0, along = 0;
          for (int64_t d = 0; d < n.D; ++d) {
            const auto at_q = static_cast<size_t>((h * n.N + i) * n.D + d);
            const auto at_k = static_cast<size_t>((r * n.N + j) * n.D + d);
            z += in.q.values[at_q] * in.k.values[at_k];
            along += dout.values[at_q] * in.v.values[at_k];
          }
          const double p = std::exp(z / std::sqrt(double(n.D)));
          weights += p;
          dots += p * along;
        }
        sum += dots / weights;
      }
    }
    return sum;
  };
  const Results results = run_method(n, small, in, dout);
  EXPECT_NEAR(std::inner_product(results.o.begin(), results.o.end(), dout.values.begin(), 0.0),
              loss(), 1e-9);
  const std::pair<const Array*, const std::vector<double>*> gradients[] = {
      {&in.q, &results.dq}, {&in.k, &results.dk}, {&in.v, &results.dv}};
  for (const auto& [input, gradient] : gradients) {
    for (size_t i = 0; i < gradient->size(); i += 7) {
      double& x = const_cast<Array*>(input)->values[i];
      const double at = x, step = 1e-5;
      x = at + step;
      const double above = loss();
      x = at - step;
      const double below = loss();
      x = at;
      EXPECT_NEAR((*gradient)[i], (above - below) / (2 * step), 1e-8) << "element " << i;
    }
  }
}

TEST(InfLlmV2, ThreadsDoNotChangeABit) {
  const Dims n{2, 4, 2, 700, 8};
  const Inputs in(n);
  const Array dout(in.q.tensor.shape, 4);
  const int threads = omp_get_max_threads();
  omp_set_num_threads(1);
  const Results one = run_method(n, small, in, dout);
  omp_set_num_threads(2);
  const Results two = run_method(n, small, in, dout);
  omp_set_num_threads(threads);
  EXPECT_TRUE(one == two);
}

}  // namespace
}  // namespace entrain
