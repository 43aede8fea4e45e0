// A few queries over many keys, as decoding asks of attention and of DashAttention's router: the
// GPU in bf16 against the CPU in double.
#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

/// Heads [first, first + count) of rows of tokens, as a projection leaves them: [B, H, N, D].
Tensor heads(const Tensor& rows, int64_t first, int64_t count, int64_t D) {
  return rows.slice(2, first * D, count * D).split(2, D).transpose(1, 2);
}

/// What a test's tensors hold on the GPU.
std::vector<char> bytes_of(std::initializer_list<Twin*> twins) {
  std::vector<char> all;
  for (Twin* twin : twins) {
    const Tensor x = twin->fetch();
    const char* from = static_cast<const char*>(x.data);
    all.insert(all.end(), from, from + x.bytes());
  }
  return all;
}

enum class Masks { absent, sparse, full, none };

struct Case {
  int64_t B = 1, Hkv = 2, g = 1, N = 1, D = 64, tokens = 1;
  Masks masks = Masks::absent;
  bool bias = false;
  int64_t window = 0;
  Runs keys = {};

  std::string name() const {
    return "B " + std::to_string(B) + " g " + std::to_string(g) + " N " + std::to_string(N) +
           " D " + std::to_string(D) + " tokens " + std::to_string(tokens) + " masks " +
           std::to_string(static_cast<int>(masks)) + " bias " + std::to_string(bias);
  }
};

/// The last N of a number of tokens over caches with room for more, which holds NaN, in blocks of
/// 64; so do biases of blocks that are not attended.
class Decoding {
 public:
  explicit Decoding(const Case& c)
      : c(c),
        first(c.tokens - c.N),
        keys(c.keys.within(c.tokens)),
        M((keys + 63) / 64),
        q(Twin::normal({c.B, c.N, c.Hkv * c.g * c.D}, DType::bf16, 1)),
        kv(Twin::normal({c.B, keys + 3, 2 * c.Hkv * c.D}, DType::bf16, 2)),
        o({c.B, c.N, c.Hkv * c.g * c.D}, DType::bf16),
        lse({c.B, c.Hkv * c.g, c.N}, DType::f32),
        mask({c.B, c.Hkv, c.N, M / 64 + 2}, DType::u64),
        bias(Twin::normal({c.B, c.Hkv, c.N, M + 2}, DType::f32, 3)),
        read({c.Hkv, read_fields}, DType::f64) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    const int64_t row = kv.cpu[2];
    for (int64_t b = 0; b < c.B; ++b) {
      std::fill_n(kv.cpu.ptr<double>() + (b * kv.cpu[1] + keys) * row, 3 * row, nan);
    }
    kv.send();
    Rng rng(4, 0);
    for (int64_t i = 0; i < c.B * c.Hkv * c.N; ++i) {
      for (int64_t block = 0; block < M + 2; ++block) {
        const bool own = block == (first + i % c.N) / 64;
        const bool on = c.masks == Masks::absent || c.masks == Masks::full ||
                        (c.masks == Masks::sparse && (own || rng.below(8) == 0));
        uint64_t& word = mask.cpu.ptr<uint64_t>()[i * mask.cpu[3] + block / 64];
        if (on) word |= uint64_t{1} << (block % 64);
        if (!on || block >= M) bias.cpu.ptr<double>()[i * (M + 2) + block] = nan;
      }
    }
    mask.send();
    bias.send();
  }

  void run_on_gpu() {
    on_gpu.attention(heads_of(q.gpu), keys_of(kv.gpu, 0), keys_of(kv.gpu, 1), blocks(&Twin::gpu),
                     heads_of(o.gpu), lse.gpu, {}, read.gpu);
  }
  void run_on_cpu() {
    on_cpu.attention(heads_of(q.cpu), keys_of(kv.cpu, 0), keys_of(kv.cpu, 1), blocks(&Twin::cpu),
                     heads_of(o.cpu), lse.cpu, {}, read.cpu);
  }
  void expect_equal() {
    EXPECT_LT(o.error(), 1e-2);
    EXPECT_LT(lse.error(), 1e-2);
    const Tensor is = lse.fetch();
    for (int64_t i = 0; i < is.numel(); ++i) {  // +infinity where a row attends nothing
      ASSERT_EQ(std::isinf(is.ptr<float>()[i]), std::isinf(lse.cpu.ptr<double>()[i]));
    }
    EXPECT_EQ(std::memcmp(read.fetch().data, read.cpu.data, read.cpu.bytes()), 0);
  }

  const Case c;
  const int64_t first, keys, M;
  Twin q, kv, o, lse, mask, bias, read;

 private:
  Tensor heads_of(const Tensor& x) const { return heads(x, 0, c.Hkv * c.g, c.D); }
  Tensor keys_of(const Tensor& x, int64_t which) const {
    return heads(x, which * c.Hkv, c.Hkv, c.D).slice(2, 0, keys);
  }
  BlockSet blocks(Tensor Twin::*side) const {
    BlockSet set{.window = c.window, .keys = c.keys, .first = first};
    if (c.masks != Masks::absent) set.mask = mask.*side;
    if (c.bias) set.bias = bias.*side;
    return set;
  }
};

void expect_equal(const Case& c) {
  SCOPED_TRACE(c.name());
  Decoding d(c);
  d.run_on_gpu();
  d.run_on_cpu();
  d.expect_equal();
}

TEST(Decode, AttentionIsTheCpus) {
  NEEDS_GPU();
  for (const int64_t D : {64, 128}) {
    for (const int64_t g : {1, 3, 4, 16}) {
      for (const int64_t N : {1, 2, 8}) {
        for (const int64_t tokens : {1, 63, 64, 1000, 5000}) {
          if (tokens < N) continue;
          const int64_t B = tokens < 1000 ? 3 : 1;
          expect_equal({.B = B, .g = g, .N = N, .D = D, .tokens = tokens});
          for (const Masks masks : {Masks::sparse, Masks::full, Masks::none}) {
            expect_equal(
                {.B = B, .g = g, .N = N, .D = D, .tokens = tokens, .masks = masks, .bias = g != 3});
          }
        }
      }
    }
  }
}

// Groups of more heads than a block takes, more blocks than the GPU runs at once, windows, keys
// that stand for runs.
TEST(Decode, AttentionOfOtherKindsIsTheCpus) {
  NEEDS_GPU();
  const Case cases[] = {
      {.g = 40, .D = 128, .tokens = 3000, .masks = Masks::sparse, .bias = true},
      {.g = 64, .N = 2, .tokens = 700},
      {.B = 40, .Hkv = 8, .g = 2, .tokens = 300, .masks = Masks::sparse, .bias = true},
      {.g = 4, .N = 8, .tokens = 2000, .window = 300},
      {.g = 4, .N = 2, .D = 128, .tokens = 2000, .masks = Masks::sparse, .window = 1000},
      {.g = 4, .tokens = 3000, .keys = {32, 16}},
      {.g = 4, .N = 8, .tokens = 40, .keys = {32, 16}},
      {.g = 2, .N = 2, .tokens = 20, .keys = {32, 16}},
      {.Hkv = 1, .g = 16, .D = 128, .tokens = 130000, .masks = Masks::sparse, .bias = true},
  };
  for (const Case& c : cases) expect_equal(c);
}

TEST(Decode, EqualInputsGiveEqualBits) {
  NEEDS_GPU();
  const Case cases[] = {
      {.B = 2, .g = 16, .D = 128, .tokens = 20000, .masks = Masks::sparse, .bias = true},
      {.B = 2, .g = 16, .D = 128, .tokens = 20000},
  };
  for (const Case& c : cases) {
    Decoding d(c);
    d.run_on_gpu();
    const std::vector<char> first = bytes_of({&d.o, &d.lse});
    for (int run = 0; run < 5; ++run) {
      d.run_on_gpu();
      EXPECT_TRUE(bytes_of({&d.o, &d.lse}) == first);
    }
  }
}

TEST(Decode, WhatIsNotANumberShowsInItsRows) {
  NEEDS_GPU();
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const auto& [masks, in_query] : {std::pair{Masks::absent, true},
                                        {Masks::absent, false},
                                        {Masks::full, true},
                                        {Masks::full, false}}) {
    const Case c{.Hkv = 1, .g = 2, .N = 2, .tokens = 3000, .masks = masks};
    Decoding d(c);
    if (in_query) {
      d.q.cpu.ptr<double>()[(c.g + 1) * c.D + 5] = nan;  // of head 1, query 1
      d.q.send();
    } else {
      d.kv.cpu.ptr<double>()[1000 * 2 * c.D + 5] = nan;  // of key 1000
      d.kv.send();
    }
    d.run_on_gpu();
    const Tensor o = d.o.fetch();
    for (int64_t row = 0; row < c.N * c.g; ++row) {
      const bool sick = !in_query || row == c.g + 1;
      for (int64_t x = 0; x < c.D; ++x) {
        ASSERT_EQ(std::isnan(o.ptr<float>()[row * c.D + x]), sick) << row << " " << x;
      }
    }
  }
}

struct RouteCase {
  int64_t B, Hkv, g, N, D;
  DashRouting routing;
  double alpha, gamma;
  int64_t first;
  int64_t room = 0;  // for later chunks
};

// Every exponent, groups that fill a tile and that do not, more queries than a tile takes, chunks
// of fewer pieces than blocks of a cluster and of many, no candidates at all; more queries than are
// decoded, as in prompts.
const RouteCase route_cases[] = {
    {1, 2, 2, 1, 64, {.chunk = 8}, 1.5, 2, 171},
    {2, 2, 16, 1, 128, {.chunk = 16, .sigma = 2, .prior_eps = 1e-2}, 1.5, 4, 5000, 7},
    {3, 2, 16, 1, 128, {.chunk = 64, .sigma = 2, .prior_eps = 1e-2}, 1.5, 8, 98303},
    {1,
     2,
     16,
     8,
     128,
     {.chunk = 64, .sigma = 2, .prior_eps = 1e-2, .init_blocks = 1, .local_blocks = 2},
     1.25,
     3,
     6001,
     3},
    {1,
     2,
     3,
     3,
     64,
     {.chunk = 7,
      .sigma = 4,
      .prior_eps = 0.1,
      .center = false,
      .init_blocks = 3,
      .local_blocks = 4},
     2,
     2,
     4000},
    {2, 2, 64, 2, 64, {.chunk = 16, .prior_eps = 1e-3, .init_blocks = 2}, 1, 1, 999, 100},
    {1, 2, 2, 1, 64, {.chunk = 64}, 1.5, 2, 0},
    {1, 2, 2, 5, 64, {.chunk = 64, .init_blocks = 20}, 1.5, 2, 300},
    {1, 1, 1, 8, 128, {.chunk = 1, .sigma = 1, .prior_eps = 1e-2, .local_blocks = 0}, 1.5, 3, 1500},
    {2, 2, 2, 40, 64, {.chunk = 8, .prior_eps = 1e-2}, 1.5, 2, 200},
    {1, 1, 2, 9, 64, {.chunk = 1, .prior_eps = 1e-2}, 1.5, 3, 700},
};

struct Routed {
  explicit Routed(const RouteCase& c, DType summaries = DType::f32)
      : c(c),
        M((c.first + c.N + c.routing.chunk - 1) / c.routing.chunk + c.room),
        q(Twin::normal({c.B, c.N, c.Hkv * c.g * c.D}, DType::bf16, 1)),
        kbar(Twin::normal({c.B, c.Hkv, M, c.D}, summaries, 2, 0.7)),
        tau({c.B, c.Hkv * c.g, c.N}, DType::f64),
        mask({c.B, c.Hkv, c.N, (M + 63) / 64}, DType::u64),
        bias({c.B, c.Hkv, c.N, M}, DType::f32),
        weights({c.B, c.Hkv, c.N, M}, DType::f32),
        read({c.Hkv, read_fields}, DType::f64) {
    routing.alpha_gamma = alpha_gamma.host().ptr<double>();
    alpha_gamma.host().ptr<double>()[0] = c.alpha;
    alpha_gamma.host().ptr<double>()[1] = c.gamma;
  }
  Routed(const Routed&) = delete;

  void run_on_gpu() { run(on_gpu, &Twin::gpu); }
  void run_on_cpu() { run(on_cpu, &Twin::cpu); }

  const RouteCase c;
  Pinned alpha_gamma{{2}, DType::f64};
  DashRouting routing = c.routing;
  bool beside = false;
  int64_t M;
  Twin q, kbar, tau, mask, bias, weights, read;

 private:
  template <class K>
  void run(const K& kernels, Tensor Twin::*side) {
    kernels.dash_route(
        heads(q.*side, 0, c.Hkv * c.g, c.D), kbar.*side, routing, tau.*side,
        {.block = routing.chunk, .mask = mask.*side, .bias = bias.*side, .first = c.first},
        weights.*side, {}, read.*side, beside);
  }
};

double error_of_doubles(Twin& twin) {
  const Tensor is = twin.fetch();
  double difference = 0, norm = 0;
  for (int64_t i = 0; i < is.numel(); ++i) {
    const double should = twin.cpu.ptr<double>()[i], d = is.ptr<double>()[i] - should;
    if (!std::isfinite(d)) return std::numeric_limits<double>::infinity();
    difference += d * d;
    norm += should * should;
  }
  return std::sqrt(norm > 0 ? difference / norm : difference);
}

void expect_routed(Routed& r) {
  r.run_on_gpu();
  r.run_on_cpu();
  const Tensor mask = r.mask.fetch();
  int64_t flips = 0, on = 0;
  for (int64_t i = 0; i < mask.numel(); ++i) {
    const uint64_t should = r.mask.cpu.ptr<uint64_t>()[i];
    flips += std::popcount(mask.ptr<uint64_t>()[i] ^ should);
    on += std::popcount(should);
  }
  EXPECT_LE(flips, on / 200);  // scores in float
  EXPECT_LT(error_of_doubles(r.tau), 1e-5);
  EXPECT_LT(r.weights.error(), 1e-4);
  EXPECT_LT(r.bias.error(), 1e-2);
  EXPECT_EQ(std::memcmp(r.read.fetch().data, r.read.cpu.data, r.read.cpu.bytes()), 0);
}

TEST(Decode, RoutesAsTheCpuDoes) {
  NEEDS_GPU();
  for (const DType summaries : {DType::f32, DType::f64}) {
    for (const RouteCase& c : route_cases) {
      SCOPED_TRACE(std::to_string(&c - route_cases));
      Routed r(c, summaries);
      expect_routed(r);
    }
  }
}

// As in steps that complete chunks, which queries of the same step route over or do not.
TEST(Decode, RoutesOverWhatTheKernelBeforeSummarizes) {
  NEEDS_GPU();
  for (const bool beside : {false, true}) {
    const int64_t N = beside ? 1 : 8, chunks = beside ? 1 : 2;
    Routed r({.B = 2,
              .Hkv = 2,
              .g = 4,
              .N = N,
              .D = 128,
              .routing = {.chunk = 4, .prior_eps = 1e-2},
              .alpha = 1.5,
              .gamma = 2,
              .first = 2000 + 4 * chunks - N});
    r.beside = beside;
    const Twin k = Twin::normal({r.c.B, 4 * chunks, r.c.Hkv * r.c.D}, DType::bf16, 5);
    const auto summarize = [&](const auto& kernels, Tensor Twin::*side) {
      kernels.dash_summaries(heads(k.*side, 0, r.c.Hkv, r.c.D), {}, 4,
                             (r.kbar.*side).slice(2, 500, chunks));
    };
    summarize(on_cpu, &Twin::cpu);
    summarize(on_gpu, &Twin::gpu);
    expect_routed(r);
  }
}

TEST(Decode, RoutesTheSameEveryTime) {
  NEEDS_GPU();
  Routed r(route_cases[2]);
  r.run_on_gpu();
  const std::vector<char> first = bytes_of({&r.tau, &r.mask, &r.bias, &r.weights});
  for (int run = 0; run < 5; ++run) {
    r.run_on_gpu();
    EXPECT_TRUE(bytes_of({&r.tau, &r.mask, &r.bias, &r.weights}) == first);
  }
}

// A NaN in one kv head's queries leaves them what is forced; the other's route as ever.
TEST(Decode, ANaNRoutesNowhere) {
  NEEDS_GPU();
  Routed r({1, 2, 4, 1, 64, {.chunk = 16, .prior_eps = 1e-2, .init_blocks = 1}, 1.5, 4, 999});
  r.q.cpu.ptr<double>()[2 * 64 + 7] = std::numeric_limits<double>::quiet_NaN();
  r.q.send();
  r.run_on_gpu();
  r.run_on_cpu();
  EXPECT_EQ(r.mask.fetch().ptr<uint64_t>()[0], uint64_t{1} | uint64_t{1} << (999 / 16));
  EXPECT_EQ(r.mask.fetch().ptr<uint64_t>()[1], r.mask.cpu.ptr<uint64_t>()[1]);
  EXPECT_LT(r.bias.error(), 1e-4);
}

}  // namespace
}  // namespace entrain
