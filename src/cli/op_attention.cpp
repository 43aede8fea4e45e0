// entrain op entmax | full | dash | infllmv2: kernels on the tensors of a case.
#include <bit>

#include "cli/op.h"
#include "kernels/kernels.h"

namespace entrain::cli {
namespace {

void check_alpha(const Case& c, double alpha) {
  require(alpha >= 1 && alpha <= 2, "{}: alpha is {}, not in [1, 2]", c.where(), alpha);
}

/// Inputs and results that the methods share.
struct Attention {
  explicit Attention(Case& c)
      : q(c.input("q", c.real, 4)), k(c.input("k", c.real, 4)), v(c.input("v", c.real, 4)) {
    require(k.shape == v.shape && k[0] == q[0] && k[2] == q[2] && k[3] == q[3] && q[1] % k[1] == 0,
            "{}: q {}, k {} and v {} do not fit together", c.where(), q.shape.to_string(),
            k.shape.to_string(), v.shape.to_string());
    o = c.result("out/out", q.shape);
    lse = c.make({q[0], q[1], q[2]}, c.sum_type());
    with_kernels(c.device, [&](auto kernels) {
      scratch = c.make({kernels.attention_scratch(q, k)}, DType::u8);
      if (c.has("dout")) {
        backward_scratch = c.make({kernels.attention_backward_scratch(q, k)}, DType::u8);
      }
    });
    read = c.make({k[1], read_fields}, DType::f64);
    if (!c.has("dout")) return;
    dout = c.input("dout", c.real, 4);
    require(dout.shape == q.shape, "{}: dout {} is not of the shape of q {}", c.where(),
            dout.shape.to_string(), q.shape.to_string());
    dq = c.result("grad/q", q.shape);
    dk = c.result("grad/k", k.shape);
    dv = c.result("grad/v", v.shape);
  }

  void forward(Device device, const BlockSet& blocks) const {
    with_kernels(device,
                 [&](auto kernels) { kernels.attention(q, k, v, blocks, o, lse, scratch, read); });
  }
  void backward(Device device, const BlockSet& blocks, Tensor dbias = {}) const {
    with_kernels(device, [&](auto kernels) {
      kernels.attention_backward(q, k, v, o, dout, lse, blocks, dq, dk, dv, dbias,
                                 backward_scratch);
    });
  }

  Tensor q, k, v, o, lse, scratch, read, dout, dq, dk, dv, backward_scratch;
};

}  // namespace

/// Scores are never rounded to bf16: routers take them as they are summed.
void run_entmax(Case& c) {
  const double alpha = c.parameter("alpha", 1.5);
  check_alpha(c, alpha);
  const Tensor z = c.input("z", c.sum_type(), 2), length = c.input("length", DType::i32, 1);
  require(length[0] == z[0], "{}: {} lengths for {} rows", c.where(), length[0], z[0]);
  const int32_t* lengths = c.host(length).ptr<int32_t>();
  for (int64_t r = 0; r < z[0]; ++r) {
    const int32_t n = lengths[r];
    require(n >= 0 && n <= z[1], "{}: length {} of row {} is not in [0, {}]", c.where(), n, r,
            z[1]);
  }
  const Tensor p = c.result("out/out", z.shape, c.sum_type());
  with_kernels(c.device, [&](auto kernels) { kernels.entmax(z, length, alpha, p); });
  if (!c.has("dout")) return;
  const Tensor dout = c.input("dout", c.sum_type(), 2);
  require(dout.shape == z.shape, "{}: dout {} is not of the shape of z {}", c.where(),
          dout.shape.to_string(), z.shape.to_string());
  const Tensor dz = c.result("grad/z", z.shape, c.sum_type());
  with_kernels(c.device, [&](auto kernels) { kernels.entmax_backward(p, dout, alpha, dz); });
}

void run_full(Case& c) {
  const Attention a(c);
  a.forward(c.device, {});
  if (a.dout) a.backward(c.device, {});
}

void run_dash(Case& c) {
  const Attention a(c);
  const Tensor summary = c.input("summary_query", c.sum_type(), 2);
  const int64_t B = a.q[0], Hq = a.q[1], N = a.q[2], D = a.q[3], Hkv = a.k[1];
  require(summary[0] == Hkv && summary[1] == D, "{}: summary_query {} does not fit k {}", c.where(),
          summary.shape.to_string(), a.k.shape.to_string());
  const double alpha = c.parameter("alpha", 1.5);
  const double alpha_gamma[] = {alpha, c.parameter("gamma", 1.0)};
  const DashRouting routing{.chunk = c.required("chunk"),
                            .sigma = c.parameter("sigma", 1e6),
                            .prior_eps = c.parameter("prior_eps", 0),
                            .center = c.parameter("center", 1) != 0,
                            .init_blocks = static_cast<int64_t>(c.parameter("init_blocks", 0)),
                            .local_blocks = static_cast<int64_t>(c.parameter("local_blocks", 1)),
                            .alpha_gamma = alpha_gamma};
  check_alpha(c, alpha);
  require(routing.chunk > 0 && routing.chunk < (1 << 30) && routing.init_blocks >= 0 &&
              routing.local_blocks >= 0 && routing.sigma > 0 && routing.prior_eps >= 0,
          "{}: chunk and sigma must be positive, init_blocks, local_blocks and prior_eps not "
          "negative",
          c.where());

  const int64_t M = (N + routing.chunk - 1) / routing.chunk;
  const Tensor kbar = c.make({B, Hkv, M, D}, DType::f64), tau = c.make({B, Hq, N}, DType::f64);
  const BlockSet blocks{.block = routing.chunk,
                        .mask = c.make({B, Hkv, N, (M + 63) / 64}, DType::u64),
                        .bias = c.make({B, Hkv, N, M}, c.sum_type())};
  const Tensor w = c.result("out/w", {B, Hkv, N, M}, c.sum_type());
  with_kernels(c.device, [&](auto kernels) {
    kernels.dash_summaries(a.k, summary, routing.chunk, kbar);
    const int64_t scratch = kernels.dash_route_scratch(a.q.shape, kbar.shape);
    kernels.dash_route(a.q, kbar, routing, tau, blocks, w, c.make({scratch}, DType::f64), a.read);
  });
  a.forward(c.device, blocks);

  const Tensor active = c.host_result("out/active", {B, Hkv, N}, DType::i32);
  const uint64_t* mask = c.host(blocks.mask).ptr<uint64_t>();
  for (int64_t i = 0; i < active.numel(); ++i) {
    for (int64_t word = 0; word < blocks.mask[3]; ++word) {
      active.ptr<int32_t>()[i] += std::popcount(mask[i * blocks.mask[3] + word]);
    }
  }
  write_density(c, a.read);
  if (!a.dout) return;

  const Tensor dbias = c.make(blocks.bias.shape, c.sum_type());
  const Tensor dkbar = c.make(kbar.shape, DType::f64);
  const Tensor ds = c.result("grad/summary_query", summary.shape, c.sum_type());
  a.backward(c.device, blocks, dbias);
  with_kernels(c.device, [&](auto kernels) {
    const Tensor scratch =
        c.make({kernels.dash_route_backward_scratch(a.q.shape, kbar.shape)}, DType::f64);
    kernels.dash_route_backward(a.q, kbar, routing, tau, blocks, dbias, a.dq, dkbar, scratch);
    kernels.dash_summaries_backward(a.k, summary, routing.chunk, dkbar, a.dk, ds);
  });
}

void run_infllmv2(Case& c) {
  const Attention a(c);
  const BlockSelection selection = read_selection(c);
  const int64_t B = a.q[0], N = a.q[2], D = a.q[3], Hkv = a.k[1];
  const int64_t M = (N + selection.block - 1) / selection.block;
  const Tensor pooled = c.make({B, Hkv, selection.windows(N), D}, DType::f64);
  const BlockSet blocks{
      .block = selection.block, .mask = c.make({B, Hkv, N, (M + 63) / 64}, DType::u64), .bias = {}};
  with_kernels(c.device, [&](auto kernels) {
    kernels.pool_runs(a.k, selection.runs(), pooled);
    const int64_t scratch = kernels.select_scratch(pooled.shape);
    kernels.select_blocks(a.q, pooled, selection, blocks, c.make({scratch}, DType::f64), a.read);
  });
  a.forward(c.device, blocks);

  write_selected(c, c.host(blocks.mask), M);
  write_density(c, a.read);
  if (a.dout) a.backward(c.device, blocks);
}

}  // namespace entrain::cli
