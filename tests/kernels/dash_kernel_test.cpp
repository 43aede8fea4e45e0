#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr DType reals[] = {DType::f32, DType::bf16};

struct Case {
  int64_t B, Hq, Hkv, N, D;
  DashRouting routing;
  double alpha = 1.5, gamma = 2;
  int64_t first = 0;  // the token that the first query is
};
constexpr Aggregation softmax = Aggregation::softmax;

// Groups of 1 to 32, head_dims that fill fragments and that do not, every exponent, more chunks
// than a pass of a warp, tiles of one query, no candidates at all.
const Case cases[] = {
    {1, 4, 2, 100, 16, {.chunk = 8}},
    {2, 4, 1, 257, 64, {.chunk = 16, .sigma = 2, .prior_eps = 1e-2}, 1.5, 4},
    {2, 3, 3, 130, 32, {.chunk = 16, .sigma = 1, .init_blocks = 1, .local_blocks = 2}, 1.25, 3},
    {1, 6, 2, 200, 24, {.chunk = 10, .sigma = 4, .prior_eps = 0.1, .center = false}, 2, 2},
    {1, 16, 1, 300, 128, {.chunk = 16, .prior_eps = 1e-3, .init_blocks = 2}, 1, 1},
    {1, 32, 1, 70, 36, {.chunk = 4, .sigma = 1, .prior_eps = 1e-2}, 1.5, 5},
    {1, 4, 2, 150, 64, {.chunk = 8, .sigma = 1, .prior_eps = 0.1, .aggregation = softmax}, 1.5, 20},
    {2, 6, 2, 90, 40, {.chunk = 4, .sigma = 1, .prior_eps = 0.1, .aggregation = softmax}, 1.25, 9},
    {1, 4, 1, 80, 16, {.chunk = 4, .prior_eps = 0.1, .aggregation = softmax}, 2, 30},
    // head_dim 64 and 128: what Hopper has a way back of its own for, over tiles of 64 chunks.
    {1, 6, 2, 500, 64, {.chunk = 4, .sigma = 1, .prior_eps = 1e-2, .init_blocks = 3}, 1.5, 3},
    {2, 8, 2, 261, 128, {.chunk = 2, .sigma = 2, .prior_eps = 1e-2, .local_blocks = 3}, 1.25, 3},
    {1, 16, 1, 203, 128, {.chunk = 1, .prior_eps = 0.1, .center = false, .init_blocks = 70}, 2, 1},
    {1, 2, 2, 300, 64, {.chunk = 1, .sigma = 1}, 1, 2},
    {2, 16, 8, 901, 64, {.chunk = 8, .sigma = 1, .prior_eps = 1e-2}, 1.5, 3},
    {2, 4, 1, 70, 64, {.chunk = 1, .sigma = 1}, 1.5, 2},
    {1, 64, 1, 190, 128, {.chunk = 1, .prior_eps = 1e-2}, 1.5, 2},
    {1, 2, 1, 1500, 16, {.chunk = 1, .sigma = 1, .prior_eps = 1e-2}, 1.5, 3},
    {1, 4, 2, 40, 64, {.chunk = 64}},
    {1, 4, 2, 33, 64, {.chunk = 8, .init_blocks = 20}},
    {2, 4, 2, 1, 64, {.chunk = 8, .local_blocks = 2}, 1.5, 3, 171},
    {1, 8, 1, 7, 32, {.chunk = 4, .local_blocks = 0}, 1.25, 3, 58},
    // What Hopper's router meets besides: several tiles of 64 chunks, candidates that begin within
    // one or after the first, groups that leave rows of 64 over, one query to 64 rows; supports
    // that lists hold, that lists hold once what has left them is dropped, and that they do not.
    {2, 3, 1, 260, 64, {.chunk = 2, .sigma = 1, .prior_eps = 1e-3, .init_blocks = 3}, 1.25, 3},
    {1, 16, 1, 400, 128, {.chunk = 2, .sigma = 1, .prior_eps = 1e-2, .local_blocks = 2}, 1.5, 0.3},
    {1, 16, 1, 40, 128, {.chunk = 16, .sigma = 1, .prior_eps = 1e-2}, 1.5, 3, 11000},
    {1,
     4,
     1,
     70,
     64,
     {.chunk = 16, .prior_eps = 0.01, .center = false, .init_blocks = 70},
     2,
     3,
     5000},
    {1, 5, 1, 50, 64, {.chunk = 16, .sigma = 1, .prior_eps = 1e-2}, 1.5, 0.01, 11000},
    {1, 8, 2, 60, 128, {.chunk = 16, .sigma = 1, .prior_eps = 1e-2}, 1.25, 0.05, 9000},
    {1, 4, 4, 140, 64, {.chunk = 4, .sigma = 1, .prior_eps = 0.1}, 2, 0.02, 2000},
    {1, 64, 1, 9, 64, {.chunk = 16, .prior_eps = 0.1, .local_blocks = 0}, 1.5, 8, 2000},
    {1, 8, 1, 20, 64, {.chunk = 4, .sigma = 1, .prior_eps = 1e-2}, 1, 3, 3000},
};

/// |gpu - cpu| / |cpu| of doubles.
double error_of(Twin& twin) {
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

bool same_bytes(Twin& a, Twin& b) {
  const Tensor x = a.fetch(), y = b.fetch();
  return std::memcmp(x.data, y.data, x.bytes()) == 0;
}
bool same_as_cpu(Twin& twin) {
  return std::memcmp(twin.fetch().data, twin.cpu.data, twin.cpu.bytes()) == 0;
}

/// The share of a mask's M bits a row that differ.
double share_of_flips(Twin& mask, int64_t M) {
  const Tensor is = mask.fetch();
  int64_t flips = 0;
  for (int64_t i = 0; i < is.numel(); ++i) {
    flips += std::popcount(is.ptr<uint64_t>()[i] ^ mask.cpu.ptr<uint64_t>()[i]);
  }
  return static_cast<double>(flips * mask.cpu[3]) / static_cast<double>(is.numel() * M);
}

/// What scores in float, where queries are bf16, allow an error of routing to be; in double,
/// double.
double routing_tolerance(DType real, double in_double, double in_float) {
  return real == DType::bf16 ? in_float : in_double;
}

/// Heads side by side in rows of tokens, as a projection leaves them.
Tensor heads(Tensor x, int64_t D) {
  return x.split(2, D).transpose(1, 2);
}

/// Everything that routing makes of a case, on both.
struct Routed {
  Routed(const Case& c, DType real)
      : c(c),
        M((c.first + c.N + c.routing.chunk - 1) / c.routing.chunk),
        q(Twin::normal({c.B, c.N, c.Hq * c.D}, real, 1)),
        kbar(Twin::normal({c.B, c.Hkv, M, c.D}, DType::f64, 2, 0.7)),
        tau({c.B, c.Hq, c.N}, DType::f64),
        mask({c.B, c.Hkv, c.N, (M + 63) / 64}, DType::u64),
        bias({c.B, c.Hkv, c.N, M}, DType::f32),
        weights({c.B, c.Hkv, c.N, M}, DType::f32),
        scratch(
            {Kernels<Device::cuda>::dash_route_scratch(heads(q.gpu, c.D).shape, kbar.gpu.shape)},
            DType::f64),
        read({c.Hkv, read_fields}, DType::f64) {
    routing.alpha_gamma = alpha_gamma;
    on_cpu.dash_route(heads(q.cpu, c.D), kbar.cpu, routing, tau.cpu, on_host, weights.cpu, {},
                      read.cpu);
    on_gpu.dash_route(heads(q.gpu, c.D), kbar.gpu, routing, tau.gpu, on_device, weights.gpu,
                      scratch.gpu, read.gpu);
  }
  Routed(const Routed&) = delete;

  Case c;
  double alpha_gamma[2] = {c.alpha, c.gamma};
  DashRouting routing = c.routing;
  int64_t M;
  Twin q, kbar, tau, mask, bias, weights, scratch, read;
  BlockSet on_host{.block = routing.chunk, .mask = mask.cpu, .bias = bias.cpu, .first = c.first};
  BlockSet on_device{.block = routing.chunk, .mask = mask.gpu, .bias = bias.gpu, .first = c.first};
};

TEST(DashOnGpu, Summarizes) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const auto& [N, D, chunk] : {std::array<int64_t, 3>{100, 64, 16},
                                      {64, 32, 64},
                                      {70, 256, 7},
                                      {20, 6, 32},
                                      {600, 128, 300},
                                      {350, 128, 64},
                                      {200, 64, 24}}) {
      SCOPED_TRACE(N);
      const int64_t B = 2, H = 3, M = (N + chunk - 1) / chunk;
      const Twin k = Twin::normal({B, N, H * D}, real, 1), s = Twin::normal({H, D}, DType::f32, 2);
      const Twin dkbar = Twin::normal({B, H, M, D}, DType::f64, 3);
      for (const bool learned : {false, true}) {
        Twin kbar = Twin::constant({B, H, M + 2, D}, DType::f64, 7);  // the ends stay so
        on_cpu.dash_summaries(heads(k.cpu, D), learned ? s.cpu : Tensor{}, chunk,
                              kbar.cpu.slice(2, 1, M));
        on_gpu.dash_summaries(heads(k.gpu, D), learned ? s.gpu : Tensor{}, chunk,
                              kbar.gpu.slice(2, 1, M));
        EXPECT_LT(error_of(kbar), routing_tolerance(real, 1e-13, 1e-6));

        Twin dk = Twin::normal({B, N, H * D}, real, 4), ds = Twin::normal({H, D}, DType::f32, 5);
        Twin again = Twin::normal({H, D}, DType::f32, 5);
        on_cpu.dash_summaries_backward(heads(k.cpu, D), learned ? s.cpu : Tensor{}, chunk,
                                       dkbar.cpu, heads(dk.cpu, D), learned ? ds.cpu : Tensor{});
        on_gpu.dash_summaries_backward(heads(k.gpu, D), learned ? s.gpu : Tensor{}, chunk,
                                       dkbar.gpu, heads(dk.gpu, D), learned ? ds.gpu : Tensor{});
        EXPECT_LT(dk.error(), tolerance(real));
        EXPECT_LT(ds.error(), 1e-6);
        on_gpu.dash_summaries_backward(heads(k.gpu, D), learned ? s.gpu : Tensor{}, chunk,
                                       dkbar.gpu, heads(dk.gpu, D), learned ? again.gpu : Tensor{});
        EXPECT_TRUE(same_bytes(ds, again));
      }
    }
  }
}

TEST(DashOnGpu, RoutesAsTheCpuDoes) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(std::to_string(&c - cases));
      Routed r(c, real);
      EXPECT_TRUE(real == DType::bf16 || same_as_cpu(r.mask));
      EXPECT_LT(share_of_flips(r.mask, r.M), 5e-3);
      EXPECT_TRUE(same_as_cpu(r.read));
      EXPECT_LT(error_of(r.tau), routing_tolerance(real, 1e-12, 1e-5));
      EXPECT_LT(r.weights.error(), routing_tolerance(real, 1e-6, 1e-4));
      EXPECT_LT(r.bias.error(), routing_tolerance(real, 1e-6, 1e-2));
    }
  }
}

TEST(DashOnGpu, RoutesBackAsTheCpuDoes) {
  NEEDS_GPU();
  for (const DType real : reals) {
    for (const Case& c : cases) {
      SCOPED_TRACE(std::to_string(&c - cases));
      if (c.first > 0) continue;  // nothing trains while decoding
      Routed r(c, real);
      // Sums of dS: of what a query attends, forced blocks included, which are not the router's.
      Twin dbias = Twin::normal(r.bias.cpu.shape, DType::f32, 3);
      for (int64_t i = 0; i < dbias.cpu.numel(); ++i) {
        const int64_t block = i % r.M, words = r.mask.cpu[3];
        const uint64_t word = r.mask.cpu.ptr<uint64_t>()[i / r.M * words + block / 64];
        if (!(word >> (block % 64) & 1)) dbias.cpu.ptr<double>()[i] = 0;
      }
      dbias.send();

      Twin dkbar({c.B, c.Hkv, r.M, c.D}, DType::f64), dkbar2({c.B, c.Hkv, r.M, c.D}, DType::f64);
      Twin dq = Twin::normal({c.B, c.N, c.Hq * c.D}, real, 4);
      Twin dq2 = Twin::normal({c.B, c.N, c.Hq * c.D}, real, 4);
      const Shape q_shape{c.B, c.Hq, c.N, c.D};
      const Twin cpu_scratch({on_cpu.dash_route_backward_scratch(q_shape, r.kbar.cpu.shape)},
                             DType::f64);
      const Twin gpu_scratch({on_gpu.dash_route_backward_scratch(q_shape, r.kbar.cpu.shape)},
                             DType::f64);
      on_cpu.dash_route_backward(heads(r.q.cpu, c.D), r.kbar.cpu, r.routing, r.tau.cpu, r.on_host,
                                 dbias.cpu, heads(dq.cpu, c.D), dkbar.cpu, cpu_scratch.cpu);
      on_gpu.dash_route_backward(heads(r.q.gpu, c.D), r.kbar.gpu, r.routing, r.tau.gpu, r.on_device,
                                 dbias.gpu, heads(dq.gpu, c.D), dkbar.gpu, gpu_scratch.gpu);
      EXPECT_LT(error_of(dkbar), routing_tolerance(real, 1e-9, 1e-2));
      EXPECT_LT(dq.error(), tolerance(real));
      dbias.send();  // it may be written over
      on_gpu.dash_route_backward(heads(r.q.gpu, c.D), r.kbar.gpu, r.routing, r.tau.gpu, r.on_device,
                                 dbias.gpu, heads(dq2.gpu, c.D), dkbar2.gpu, gpu_scratch.gpu);
      EXPECT_TRUE(same_bytes(dkbar, dkbar2));
      EXPECT_TRUE(same_bytes(dq, dq2));
    }
  }
}

TEST(DashOnGpu, MeasuresEntropyAsTheCpuDoes) {
  NEEDS_GPU();
  for (const Case& c : cases) {
    SCOPED_TRACE(std::to_string(&c - cases));
    if (c.first > 0) continue;
    Routed r(c, DType::f32);
    Twin entropy = Twin::constant({c.N, entropy_fields}, DType::f64, 1);  // it is added to
    on_cpu.dash_entropy(heads(r.q.cpu, c.D), r.kbar.cpu, r.routing, r.tau.cpu, entropy.cpu);
    on_gpu.dash_entropy(heads(r.q.gpu, c.D), r.kbar.gpu, r.routing, r.tau.gpu, entropy.gpu);
    EXPECT_LT(error_of(entropy), 1e-12);
  }
}

// A NaN stays with its query: the others route as ever, and nothing hangs.
TEST(DashOnGpu, ANaNRoutesNowhere) {
  NEEDS_GPU();
  const double alpha_gamma[] = {1.5, 2};
  const DashRouting routing{.chunk = 8, .prior_eps = 1e-2, .alpha_gamma = alpha_gamma};
  const int64_t Hq = 4, Hkv = 2, N = 100, D = 64, M = (N + 7) / 8;
  for (const DType real : reals) {
    SCOPED_TRACE(name_of(real));
    Twin q = Twin::normal({1, Hq, N, D}, real, 1);
    const Twin kbar = Twin::normal({1, Hkv, M, D}, DType::f64, 2);
    for (int64_t h = 0; h < Hq; ++h) {
      q.cpu.ptr<double>()[(h * N + 60) * D + 3] = std::numeric_limits<double>::quiet_NaN();
    }
    q.send();
    Twin tau({1, Hq, N}, DType::f64), mask({1, Hkv, N, 1}, DType::u64);
    Twin bias({1, Hkv, N, M}, DType::f32);
    const Twin scratch({on_gpu.dash_route_scratch(q.gpu.shape, kbar.gpu.shape)}, DType::f64);
    on_cpu.dash_route(q.cpu, kbar.cpu, routing, tau.cpu,
                      {.block = 8, .mask = mask.cpu, .bias = bias.cpu}, {}, {}, {});
    on_gpu.dash_route(q.gpu, kbar.gpu, routing, tau.gpu,
                      {.block = 8, .mask = mask.gpu, .bias = bias.gpu}, {}, scratch.gpu, {});
    EXPECT_TRUE(same_as_cpu(mask));
    EXPECT_LT(bias.error(), routing_tolerance(real, 1e-6, 1e-4));
    EXPECT_EQ(mask.fetch().ptr<uint64_t>()[60], uint64_t{1} << (60 / 8));
  }
}

TEST(DashOnGpu, RefusesWhatSharedMemoryCannotHold) {
  NEEDS_GPU();
  const double alpha_gamma[] = {1.5, 1};
  const DashRouting routing{.chunk = 1, .alpha_gamma = alpha_gamma};
  const Twin q = Twin::zeros({1, 64, 1000, 16}, DType::bf16);
  const Twin kbar = Twin::zeros({1, 1, 1000, 16}, DType::f64);
  const Twin tau({1, 64, 1000}, DType::f64), mask({1, 1, 1000, 16}, DType::u64),
      bias({1, 1, 1000, 1000}, DType::f32);
  try {
    on_gpu.dash_route(q.gpu, kbar.gpu, routing, tau.gpu,
                      {.block = 1, .mask = mask.gpu, .bias = bias.gpu}, {}, {}, {});
    FAIL() << "it was not refused";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("shared memory"), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace entrain
