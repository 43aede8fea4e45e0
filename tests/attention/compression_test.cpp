// NSA's compression and what it is made of.
#include "attention/compression.h"

#include "tests/support.h"

namespace entrain {
namespace {

/// Compresses the heads of a packed x [B, N, H D] with random parameters.
struct Case {
  Case(const std::string& kind, Runs windows, Shape shape, int64_t H)
      : compression(kind, windows), D(shape[2] / H), x(pool.leaf(shape)) {
    for (const ParamSpec& spec : compression.params("compress_k", D)) {
      params.push_back(pool.leaf(spec.shape, 0.4));
    }
  }

  Var record(Tape& tape) {
    const auto heads = [&](const Tensor& t) { return t.split(2, D).transpose(1, 2); };
    return y = compression.record(tape, {heads(x.value), heads(x.grad)}, params,
                                  {heads(x.value)[2]});
  }

  Pool pool;
  Compression compression;
  int64_t D;
  Var x, y;
  std::vector<Var> params;
};

const std::pair<Runs, Shape> shapes[] = {
    {{8, 4}, {2, 21, 12}},  // the last token is in no window
    {{4, 4}, {1, 16, 12}},  // side by side
    {{3, 5}, {1, 20, 12}},  // with gaps
    {{6, 1}, {1, 9, 12}},   // as close as can be
    {{8, 4}, {1, 8, 12}},   // one window
    {{8, 4}, {1, 7, 12}},   // none
};

TEST(Compression, GradientsAreSlopes) {
  for (const char* kind : Compression::kinds()) {
    for (const auto& [windows, shape] : shapes) {
      Case c(kind, windows, shape, 3);
      double loss = 0;
      Graph graph(training_f64, [&](Tape& tape) { probe(tape, c.pool, c.record(tape), loss); });
      SCOPED_TRACE(fmt::format("{} {}/{} of {}", kind, windows.length, windows.stride, shape[1]));
      expect_gradients(graph, loss, {c.x}, c.params);
    }
  }
}

TEST(Compression, StartsAsTheMean) {
  const Runs windows{8, 4};
  for (const char* kind : Compression::kinds()) {
    Case c(kind, windows, {2, 21, 12}, 3);
    const Params start(c.compression.params("compress_k", c.D), 1, true, Device::cpu, DType::f64);
    for (size_t i = 0; i < c.params.size(); ++i) c.params[i] = start.all()[i].var();
    Graph graph({.dtype = DType::f64}, [&](Tape& tape) { c.record(tape); });
    graph->forward();
    std::vector<double> means;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t h = 0; h < 3; ++h) {
        for (int64_t m = 0; m + 8 <= 21; m += 4) {
          for (int64_t d = 0; d < c.D; ++d) {
            double sum = 0;
            for (int64_t t = m; t < m + 8; ++t)
              sum += get(c.x.value, (b * 21 + t) * 12 + h * c.D + d);
            means.push_back(sum / 8);
          }
        }
      }
    }
    EXPECT_LT(relative_error(c.y.value, means), 1e-14) << kind;
  }
}

TEST(Compression, PositionsTellTheRowsOfAWindowApart) {
  for (const char* kind : {"mlp", "linear"}) {
    Case c(kind, {4, 4}, {1, 4, 4}, 1);
    Graph graph({.dtype = DType::f64}, [&](Tape& tape) { c.record(tape); });
    graph->forward();
    const std::vector<double> before = values(c.y.value);
    for (int64_t d = 0; d < 4; ++d)
      std::swap(c.x.value.ptr<double>()[d], c.x.value.ptr<double>()[4 + d]);
    graph->forward();
    EXPECT_GT(relative_error(c.y.value, before), 1e-2) << kind;
  }
}

TEST(Gate, GradientsAreSlopes) {
  const Kernels<Device::cpu> kernels;
  Pool pool;
  const Var x = pool.leaf({2, 5, 3}), bias = pool.leaf({3});  // packed [B, N, H]
  const auto heads = [](const Tensor& t) { return t.split(2, 1).transpose(1, 2); };
  double loss = 0;
  Graph graph(training_f64, [&](Tape& tape) {
    const Var gate = tape.var({2, 3, 5, 1});
    tape.record(
        "gate", gate.value, x.grad, [=] { kernels.gate(heads(x.value), bias.value, gate.value); },
        [=] { kernels.gate_backward(gate.grad, gate.value, heads(x.grad), bias.grad); });
    probe(tape, pool, gate, loss);
  });
  expect_gradients(graph, loss, {x}, {bias});
}

}  // namespace
}  // namespace entrain
