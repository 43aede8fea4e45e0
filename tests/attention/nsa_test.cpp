// NSA: its branches against a direct one, the method's gradients, and how it starts beside a dense
// checkpoint. Gradients of the whole layer with compression and gates are in the decoder's tests.
#include <map>
#include <numeric>

#include "attention/attention.h"
#include "attention/compression.h"
#include "attention/nsa_branches.h"
#include "model/decoder.h"
#include "optim/adamw.h"
#include "tests/support.h"
#include "tests/temp_dir.h"
#include "train/checkpoint.h"

namespace entrain {
namespace {

struct Dims {
  int64_t B, Hq, Hkv, N, D;
};

/// Inputs of the branches, and their recording.
struct Case {
  Case(const Dims& sizes, const BlockSelection& s, int64_t tokens, DType real = DType::f64)
      : n(sizes), selection(s), window(tokens), pool(real), M((n.N + s.block - 1) / s.block) {
    selection.score = BlockScore::sum;
    const Shape all{n.B, n.Hkv, n.N, n.D}, some{n.B, n.Hkv, s.windows(n.N), n.D};
    gate = pool.leaf({n.B, n.Hq, n.N, 3});
    const auto of = [](const Var& x, int i) {
      return Var{x.value.slice(3, i, 1), x.grad.slice(3, i, 1)};
    };
    in = {.q = pool.leaf({n.B, n.Hq, n.N, n.D}),
          .kc = pool.leaf(some),
          .vc = pool.leaf(some),
          .ks = pool.leaf(all),
          .vs = pool.leaf(all),
          .kw = pool.leaf(all),
          .vw = pool.leaf(all),
          .gates = {of(gate, 0), of(gate, 1), of(gate, 2)},
          .read = pool.make({n.Hkv, read_fields}, DType::f64)};
    for (const Var& x : leaves()) fill(x.grad, NAN);  // all must be written
  }

  Graph graph() {
    return Graph({.dtype = in.q.value.dtype, .training = true}, [this](Tape& tape) {
      const Var o = tape.var(in.q.value.shape);
      mask = record_nsa(tape, selection, window, in, o);
      out = o.value;
      probe(tape, pool, o, loss);
    });
  }
  std::vector<Var> leaves() const { return {in.q, in.kc, in.vc, in.ks, in.vs, in.kw, in.vw, gate}; }
  bool selects(int64_t kv, int64_t i, int64_t c) const {
    return mask.ptr<uint64_t>()[(kv * n.N + i) * mask[3] + c / 64] >> (c % 64) & 1;
  }
  double read(ReadField field) const {
    double sum = 0;
    for (int64_t r = 0; r < n.Hkv; ++r) sum += in.read.ptr<double>()[r * read_fields + field];
    return sum;
  }

  Dims n;
  BlockSelection selection;
  int64_t window;
  Pool pool;
  int64_t M;
  Var gate;
  NsaInput in;
  Tensor mask, out;
  double loss = 0;
};

/// The definition, a query at a time.
struct Direct {
  explicit Direct(const Case& x) : c(x) {
    const auto& [B, Hq, Hkv, N, D] = c.n;
    const int64_t g = Hq / Hkv;
    for (int64_t b = 0; b < B; ++b) {
      for (int64_t h = 0; h < Hq; ++h) {
        for (int64_t i = 0; i < N; ++i) query(b * Hq + h, b * Hkv + h / g, i, h % g == g - 1);
      }
    }
  }

  /// Softmax over the keys that `sees` admits; adds gate times its output to out's row.
  template <class Sees>
  std::vector<double> attend(const Var& k, const Var& v, int branch, int64_t head, int64_t kv,
                             int64_t i, Sees sees) {
    const int64_t N = c.n.N, D = c.n.D, keys = k.value[2];
    std::vector<double> p(static_cast<size_t>(keys));
    double sum = 0;
    for (int64_t j = 0; j < keys; ++j) {
      if (!sees(j)) continue;
      double z = 0;
      for (int64_t d = 0; d < D; ++d) {
        z += get(c.in.q.value, (head * N + i) * D + d) * get(k.value, (kv * keys + j) * D + d);
      }
      sum += p[static_cast<size_t>(j)] = std::exp(z / std::sqrt(double(D)));
    }
    const double gate = get(c.gate.value, (head * N + i) * 3 + branch);
    for (int64_t j = 0; j < keys; ++j) {
      double& weight = p[static_cast<size_t>(j)];
      weight = sum > 0 ? weight / sum : 0;
      for (int64_t d = 0; d < D; ++d) {
        out[static_cast<size_t>((head * N + i) * D + d)] +=
            gate * weight * get(v.value, (kv * keys + j) * D + d);
      }
    }
    return p;
  }

  void query(int64_t head, int64_t kv, int64_t i, bool last_of_group) {
    const BlockSelection& s = c.selection;
    out.resize(static_cast<size_t>(c.out.numel()));
    const std::vector<double> p = attend(c.in.kc, c.in.vc, 0, head, kv, i, [&](int64_t m) {
      return m * s.stride + s.length - 1 <= i;
    });
    attend(c.in.ks, c.in.vs, 1, head, kv, i,
           [&](int64_t j) { return j <= i && c.selects(kv, i, j / s.block); });
    attend(c.in.kw, c.in.vw, 2, head, kv, i, [&](int64_t j) { return j <= i && i - j < c.window; });
    std::vector<double>& sum = weights[{kv, i}];
    sum.resize(p.size());
    for (size_t m = 0; m < p.size(); ++m) sum[m] += p[m];
    if (last_of_group) count(kv, i);
  }

  /// What the summed weights choose, and what is read.
  void count(int64_t kv, int64_t i) {
    const BlockSelection& s = c.selection;
    const std::vector<double>& p = weights[{kv, i}];
    const int64_t own = i / s.block, in_block = s.block / s.stride;
    std::vector<double> score(static_cast<size_t>(own + 1));
    for (int64_t j = 0; j <= own; ++j) {
      for (int64_t m = 0; m < in_block; ++m) {
        for (int64_t l = 0; l < s.length / s.stride; ++l) {
          const int64_t x = in_block * j + m - l;
          if (x >= 0 && x < int64_t(p.size())) score[size_t(j)] += p[size_t(x)];
        }
      }
      if (j < s.init_blocks || j > own - s.local_blocks) score[size_t(j)] = 1e30;
    }
    std::vector<size_t> order(score.size());
    std::iota(order.begin(), order.end(), 0);
    std::ranges::stable_sort(order, [&](size_t a, size_t b) { return score[a] > score[b]; });
    std::vector<bool> chosen(static_cast<size_t>(c.M));
    for (size_t j = 0; j < std::min(order.size(), size_t(s.topk)); ++j) chosen[order[j]] = true;
    for (int64_t j = 0; j < c.M; ++j) differ += chosen[size_t(j)] != c.selects(kv, i, j);
    for (int64_t j = 0; j <= i; ++j) pairs += chosen[size_t(j / s.block)] || i - j < c.window;
    windows += double(s.windows(i + 1));
    for (int64_t j = 0; j <= i; ++j) visits += double(chosen[size_t(j / s.block)]);
    visits += double(std::min(i + 1, c.window));
  }

  const Case& c;
  std::map<std::pair<int64_t, int64_t>, std::vector<double>> weights;
  std::vector<double> out;
  double pairs = 0, windows = 0;
  double visits = 0;  // of the selected and the window branch
  int64_t differ = 0;
};

const std::tuple<Dims, BlockSelection, int64_t> cases[] = {
    {{1, 2, 1, 64, 16}, {64, 2, 1, 1, 32, 16}, 64}, {{2, 4, 2, 75, 8}, {16, 3, 1, 1, 8, 4}, 24},
    {{1, 4, 1, 700, 4}, {8, 9, 1, 2, 32, 8}, 100},   // several tiles, masks of two words
    {{1, 1, 1, 90, 4}, {8, 3, 0, 1, 8, 8}, 1},       // windows side by side; the token alone
    {{1, 3, 3, 61, 6}, {9, 4, 2, 1, 3, 3}, 1000},    // a window that holds all
    {{1, 2, 1, 20, 4}, {4, 2, 0, 1, 32, 4}, 7},      // nothing to compress
    {{1, 2, 2, 100, 4}, {4, 1000, 1, 2, 16, 4}, 5},  // every block
    {{1, 2, 1, 100, 4}, {8, 3, 1, 2, 24, 4}, 65},    // forced blocks only
    {{1, 2, 1, 1, 4}, {64, 16, 1, 2, 32, 16}, 512},
};

TEST(Nsa, IsWhatTheDefinitionSays) {
  for (const auto& [n, s, window] : cases) {
    const Threads one(1);
    Case c(n, s, window);
    Graph graph = c.graph();
    graph->forward();
    const Direct direct(c);
    SCOPED_TRACE(fmt::format("N {} block {} window {}", n.N, s.block, window));
    EXPECT_LT(relative_error(c.out, direct.out), 1e-12);
    EXPECT_EQ(direct.differ, 0);
    EXPECT_EQ(c.read(read_pairs), direct.pairs);
    EXPECT_EQ(c.read(read_router), direct.windows);
    // Three branches, and the scores that select.
    const int64_t width = n.Hq / n.Hkv * n.D;
    EXPECT_EQ(c.read(read_flops),
              double(width) * (12 * (direct.visits + direct.windows) + 2 * direct.windows));
    EXPECT_EQ(c.read(read_causal), double(n.B * n.Hkv * n.N * (n.N + 1) / 2));
  }
}

TEST(Nsa, GradientsAreSlopes) {
  for (const auto& [n, s, window] : cases) {
    Case c(n, s, window);
    Graph graph = c.graph();
    graph->forward();
    graph->backward();
    const auto loss = [&] {
      graph->forward();
      return c.loss;
    };
    int leaf = 0;
    for (const Var& x : c.leaves()) {
      EXPECT_LT(gradient_error(x.value, values(x.grad), loss, n.N > 200 ? 3 : 20, 1e-5), 1e-6)
          << "N " << n.N << " block " << s.block << " leaf " << leaf;
      ++leaf;
    }
  }
}

TEST(Nsa, ThreadsDoNotChangeABit) {
  // The method without learned compression, whose products are BLAS's.
  const auto method = make_attention({.method = "nsa",
                                      .init_blocks = 1,
                                      .block = 16,
                                      .topk = 6,
                                      .l = 8,
                                      .d = 4,
                                      .window = 50,
                                      .compression = "mean"});
  const HeadShape heads{4, 2, 8};
  const int64_t B = 2, N = 700;
  const auto run = [&](int threads) {
    const Threads some(threads);
    Pool pool(DType::f32);
    const auto leaf = [&](int64_t H, int64_t width) { return pool.leaf({B, H, N, width}); };
    AttentionInput in{.q = leaf(4, 8),
                      .k = leaf(2, 8),
                      .v = leaf(2, 8),
                      .projected = {},
                      .params = {},
                      .read = pool.make({2, read_fields}, DType::f64)};
    for (const Projection& x : method->projections(heads)) {
      in.projected.push_back(leaf(x.heads, x.width));
    }
    for (const ParamSpec& x : method->params(heads)) in.params.push_back(pool.leaf(x.shape));
    const Var o = leaf(4, 8);
    for (int64_t i = 0; i < o.grad.numel(); ++i) put(o.grad, i, pool.rng().normal());
    Graph graph({.training = true}, [&](Tape& tape) { method->record(tape, in, o); });
    graph->forward();
    graph->backward();
    std::vector<Var> leaves{o, in.q, in.k, in.v};
    leaves.insert(leaves.end(), in.projected.begin(), in.projected.end());
    leaves.insert(leaves.end(), in.params.begin(), in.params.end());
    std::vector<std::vector<double>> results{values(in.read)};
    for (const Var& x : leaves) {
      results.push_back(values(x.value));
      results.push_back(values(x.grad));
    }
    return results;
  };
  EXPECT_EQ(run(1), run(2));
}

/// A decoder that learns to repeat the token three before: it has to attend.
struct Repeater {
  static constexpr int64_t B = 4, N = 48;
  static constexpr int vocab = 7;

  explicit Repeater(const AttentionConfig& attention)
      : decoder({.n_layer = 2,
                 .d_model = 32,
                 .n_head = 4,
                 .n_kv_head = 2,
                 .head_dim = 8,
                 .d_ff = 48,
                 .vocab = vocab},
                attention, N, 1, true, Device::cpu),
        tokens(pool.integers({B, N}, vocab)),
        targets(pool.make({B, N}, DType::i32)),
        graph({.training = true}, [this](Tape& tape) {
          losses = decoder.loss(tape, tokens, targets, 1 / double(B * N));
        }) {
    for (int64_t i = 0; i < B * N; ++i) {
      targets.ptr<int32_t>()[i] = tokens.ptr<int32_t>()[i % N < 3 ? i : i - 3];
    }
  }

  double loss() {
    graph->forward();
    const std::vector<double> all = values(losses);
    return std::accumulate(all.begin(), all.end(), 0.0) / double(all.size());
  }
  void train(int steps) {
    Params& params = decoder.params();
    Optimizer optimizer(params, {});
    for (int step = 1; step <= steps; ++step) {
      loss();
      graph->backward();
      optimizer.prepare(step, 3e-3);
      optimizer.update();
    }
    fill(params.grads(), 0);
  }

  Pool pool{DType::f32};
  Decoder decoder;
  Tensor tokens, targets, losses;
  Graph graph;
};

AttentionConfig nsa_of(int topk, int window, const char* compression = "mlp") {
  return {.method = "nsa",
          .init_blocks = 1,
          .local_blocks = 2,
          .block = 8,
          .topk = topk,
          .l = 8,
          .d = 4,
          .window = window,
          .compression = compression};
}

TEST(Nsa, StartsCloseToTheDenseModelItIsInitialisedFrom) {
  const TempDir dir;
  const Threads one(1);
  Repeater dense({.method = "full"});
  const double untrained = dense.loss();
  dense.train(50);
  const double trained = dense.loss();
  ASSERT_LT(trained, 0.7 * untrained);
  const std::string path = dir / "dense.h5";
  const Params& params = dense.decoder.params();
  save_checkpoint(path, params, {params.m(), params.v()}, {}, "", "", 1);

  for (const char* compression : Compression::kinds()) {
    Repeater everything(nsa_of(1000, 1000, compression));
    const Shared shared = load_shared(path, everything.decoder.params());
    EXPECT_EQ(shared.taken.size(), dense.decoder.params().all().size());
    EXPECT_EQ(shared.adopted.size(), 2u * (7 + 3));  // projections and biases of two layers
    EXPECT_TRUE(shared.unused.empty());
    // All blocks and all tokens are attended with gates that add up to 1; the compressed branch
    // adds a fiftieth of itself.
    EXPECT_NEAR(everything.loss(), trained, 0.02 * trained) << compression;
  }
  Repeater sparse(nsa_of(4, 8));
  load_shared(path, sparse.decoder.params());
  EXPECT_LT(sparse.loss(), 0.75 * trained + 0.25 * untrained);

  Repeater fresh(nsa_of(1000, 1000));
  EXPECT_GT(fresh.loss(), 1.3 * trained);
}

TEST(Nsa, LearnsFromScratch) {
  const Threads one(1);
  Repeater nsa(nsa_of(3, 8));
  const double untrained = nsa.loss();
  nsa.train(60);
  EXPECT_LT(nsa.loss(), 0.7 * untrained);
}

}  // namespace
}  // namespace entrain
