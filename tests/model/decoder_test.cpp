#include "model/decoder.h"

#include <gtest/gtest.h>

#include <map>

#include "tests/expect_error.h"
#include "tests/tiny_decoder.h"

namespace entrain {
namespace {

TEST(Decoder, GradientsOfAllParametersAreSlopes) {
  for (const char* method : {"full", "dash", "nsa", "infllmv2"}) {
    for (const bool tied : {false, true}) {
      TinyDecoder tiny(method, DType::f64, 2, 13, tied);
      Graph graph(training_f64, tiny.training());
      tiny.gradient(graph);
      const std::vector<Param>& params = tiny.decoder.params().all();
      std::vector<std::vector<double>> gradients;  // forward adds to the head's: copy first
      for (const Param& p : params) gradients.push_back(values(p.grad));
      const auto loss = [&] {
        graph->forward();
        return tiny.mean_loss();
      };
      for (size_t i = 0; i < params.size(); ++i) {
        EXPECT_LT(gradient_error(params[i].value, gradients[i], loss, 12, 1e-5), 1e-6)
            << method << (tied ? " tied " : " ") << params[i].name;
      }
    }
  }
}

TEST(Decoder, MicroBatchesAddUpToTheBatch) {
  TinyDecoder tiny("dash", DType::f64, 4);
  Graph whole(training_f64, tiny.training());
  const std::vector<double> gradient = tiny.gradient(whole);

  const int64_t N = tiny.tokens[1];
  const Tensor tokens = tiny.pool.make({1, N}, DType::i32),
               targets = tiny.pool.make({1, N}, DType::i32);
  Graph micro(training_f64, [&](Tape& tape) {
    tiny.decoder.loss(tape, tokens, targets, 1 / static_cast<double>(4 * N));
  });
  fill(tiny.decoder.params().grads(), 0);
  for (int64_t b = 0; b < 4; ++b) {
    std::memcpy(tokens.data, tiny.tokens.slice(0, b, 1).data, tokens.bytes());
    std::memcpy(targets.data, tiny.targets.slice(0, b, 1).data, targets.bytes());
    micro->forward();
    micro->backward();
  }
  EXPECT_LT(relative_error(tiny.decoder.params().grads(), gradient), 1e-12);
}

TEST(Decoder, LaterTokensDoNotReachEarlierLogits) {
  for (const char* method : {"full", "dash", "nsa", "infllmv2"}) {
    TinyDecoder tiny(method, DType::f64, 1);
    Tensor logits;
    Graph graph({.dtype = DType::f64},
                [&](Tape& tape) { logits = tiny.decoder.logits(tape, tiny.tokens); });
    graph->forward();
    const std::vector<double> before = values(logits.slice(0, 0, 9)), all = values(logits);
    int32_t& later = tiny.tokens.ptr<int32_t>()[9];
    later = (later + 1) % TinyDecoder::vocab;
    graph->forward();
    EXPECT_EQ(values(logits.slice(0, 0, 9)), before) << method;
    EXPECT_NE(values(logits), all) << method;
  }
}

TEST(Decoder, TheLossIsTheCrossEntropyOfTheLogits) {
  TinyDecoder tiny("dash");
  Tensor logits;
  Graph head({.dtype = DType::f64}, tiny.training());
  Graph whole({.dtype = DType::f64},
              [&](Tape& tape) { logits = tiny.decoder.logits(tape, tiny.tokens); });
  head->forward();
  whole->forward();
  std::vector<double> expected;
  for (int64_t t = 0; t < logits[0]; ++t) {
    double sum = 0;
    for (int64_t j = 0; j < logits[1]; ++j) sum += std::exp(get(logits, t * logits[1] + j));
    const int64_t target = tiny.targets.ptr<int32_t>()[t];
    expected.push_back(std::log(sum) - get(logits, t * logits[1] + target));
  }
  EXPECT_LT(relative_error(tiny.loss, expected), 1e-12);
}

TEST(Decoder, AnnouncesEveryGradientOnceWhenItIsFinal) {
  for (const bool tied : {false, true}) {
    TinyDecoder tiny("dash", DType::f64, 2, 13, tied);
    std::map<const double*, std::vector<double>> pieces;
    Graph graph(training_f64, [&](Tape& tape) {
      tiny.decoder.loss(tape, tiny.tokens, tiny.targets, 1, [&](Tensor flat) {
        EXPECT_TRUE(pieces.emplace(flat.ptr<double>(), values(flat)).second) << "announced twice";
      });
    });
    fill(tiny.decoder.params().grads(), 0);
    graph->forward();
    graph->backward();
    for (const Param& p : tiny.decoder.params().all()) {
      const double* grad = p.grad.ptr<double>();
      const auto [at, piece] = *std::prev(pieces.upper_bound(grad));
      ASSERT_LE(grad - at + p.grad.numel(), std::ssize(piece)) << p.name;
      EXPECT_TRUE(std::equal(grad, grad + p.grad.numel(), piece.begin() + (grad - at))) << p.name;
    }
    const double* end = nullptr;  // of the pieces before
    for (const auto& [at, piece] : pieces) {
      EXPECT_GE(at, end) << "announced twice";
      end = at + piece.size();
    }
    EXPECT_EQ(pieces.size(), 4);  // embedding, two layers, norm and head
  }
}

TEST(Decoder, RefusesSequencesBeyondItsTable) {
  TinyDecoder tiny("full");
  TapeMemory memory(Device::cpu);
  Tape tape(memory, {.dtype = DType::f64});
  const Tensor longer = tiny.pool.integers({1, 14}, 11);
  EXPECT_ERROR(tiny.decoder.logits(tape, longer), "14 tokens a sequence; the decoder was made for");
}

TEST(Decoder, CountsProductsWithWeights) {
  const int64_t N = 13, windows = 5;
  for (const char* method : {"full", "dash", "infllmv2", "nsa"}) {
    int64_t expected = 0;  // each matrix is applied to all tokens, NSA's compression to windows
    TinyDecoder tiny(method);
    for (const Param& p : tiny.decoder.params().all()) {
      const bool compresses = p.name.find("compress_") != std::string::npos;
      if (p.value.shape.rank < 2 || p.name.find("embed") != std::string::npos ||
          p.name.ends_with("position")) {
        continue;
      }
      expected += p.value.numel() * (compresses ? 2 * windows : N);  // for two key-value heads
    }
    EXPECT_EQ(tiny.decoder.products(N), expected) << method;
  }
}

TEST(Decoder, ReadsWhatEachLayerAttends) {
  TinyDecoder tiny("full");
  Graph graph({.dtype = DType::f64}, tiny.training());
  graph->forward();
  ASSERT_EQ(tiny.decoder.read().shape, (Shape{2, 2, read_fields}));
  for (int64_t head = 0; head < 4; ++head) {
    const double* fields = tiny.decoder.read().ptr<double>() + head * read_fields;
    EXPECT_EQ(fields[read_pairs], 2 * 13 * 14 / 2);
    EXPECT_EQ(fields[read_causal], 2 * 13 * 14 / 2);
    EXPECT_EQ(fields[read_queries], 2 * 13);
  }
}

}  // namespace
}  // namespace entrain
