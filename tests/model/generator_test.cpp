// Decoding against caches is the forward pass on the same tokens.
#include "model/generator.h"

#include "tests/expect_error.h"
#include "tests/support.h"

namespace entrain {
namespace {

constexpr int vocab = 11;

struct Setting {
  std::string name;
  AttentionConfig attention;
};

AttentionConfig dash(int chunk, int init_blocks, int local_blocks, double gamma = 2) {
  return {.method = "dash",
          .chunk = chunk,
          .gamma = gamma,
          .sigma = 2,
          .init_blocks = init_blocks,
          .local_blocks = local_blocks};
}

AttentionConfig ablated(AttentionConfig c, const char* summaries, const char* aggregation) {
  c.summaries = summaries;
  c.aggregation = aggregation;
  return c;
}

AttentionConfig selecting(const std::string& method, int block, int topk, int l, int d,
                          int window = 5, const std::string& compression = "mlp") {
  return {.method = method,
          .init_blocks = 1,
          .local_blocks = 1,
          .block = block,
          .topk = topk,
          .l = l,
          .d = d,
          .window = window,
          .compression = compression};
}

/// Blocks, windows and strides that divide 150 tokens and pieces of 64, and such that do not.
const Setting settings[] = {
    {"full", {.method = "full"}},
    {"dash 4", dash(4, 0, 1)},
    {"dash 7 with forced chunks", dash(7, 2, 3)},
    {"dash 50", dash(50, 0, 1)},
    {"dash 1", dash(1, 0, 1, 0.5)},
    {"dash with a chunk beyond the end", dash(1000, 0, 1)},
    {"dash of means", ablated(dash(4, 0, 1), "mean", "entmax")},
    {"dash of softmax", ablated(dash(4, 0, 1, 30), "learned", "softmax")},
    {"infllmv2 4", selecting("infllmv2", 4, 4, 4, 2)},
    {"infllmv2 7", selecting("infllmv2", 7, 5, 5, 3)},
    {"infllmv2 with gaps", selecting("infllmv2", 8, 3, 3, 5)},
    {"nsa 4", selecting("nsa", 4, 4, 4, 2)},
    {"nsa 6 linear", selecting("nsa", 6, 3, 6, 3, 20, "linear")},
    {"nsa 64 mean", selecting("nsa", 64, 2, 32, 16, 70, "mean")},
};

/// A decoder, a sequence, and the logits of its forward pass.
struct Case {
  Case(const AttentionConfig& attention, DType real, int64_t tokens)
      : N(tokens),
        pool(real),
        decoder({.n_layer = 2,
                 .d_model = 8,
                 .n_head = 4,
                 .n_kv_head = 2,
                 .head_dim = 6,
                 .d_ff = 10,
                 .vocab = vocab},
                attention, N, 1, false, Device::cpu, real) {
    const Tensor all = decoder.params().values();
    for (int64_t i = 0; i < all.numel(); ++i) put(all, i, get(all, i) + 0.4 * pool.rng().normal());
    const Tensor batch = pool.integers({1, N}, vocab);
    ids.assign(batch.ptr<int32_t>(), batch.ptr<int32_t>() + N);
    Tensor logits;
    Graph graph({.dtype = real}, [&](Tape& tape) { logits = decoder.logits(tape, batch); });
    graph->forward();
    expected = values(logits);
    read = values(decoder.read());
    fill(decoder.read(), 0);
  }

  /// Appends tokens [begin, begin + count) and compares what follows the last; relative.
  double error(Generator& generator, int64_t begin, int64_t count) const {
    const Tensor logits = generator.append(std::span(ids).subspan(begin, count));
    const auto at = expected.begin() + (begin + count - 1) * vocab;
    return relative_error(logits, std::vector<double>(at, at + vocab));
  }

  const int64_t N;
  Pool pool;
  Decoder decoder;
  std::vector<int32_t> ids;
  std::vector<double> expected, read;
};

TEST(Generator, TokenByTokenIsTheForwardPass) {
  const Threads one(1);
  for (const auto& [name, attention] : settings) {
    SCOPED_TRACE(name);
    Case c(attention, DType::f64, 150);
    Generator generator(c.decoder, c.N);
    for (int64_t t = 0; t < c.N; ++t) ASSERT_LT(c.error(generator, t, 1), 1e-9) << "token " << t;
    EXPECT_EQ(values(c.decoder.read()), c.read);
  }
}

TEST(Generator, PiecesOfAnySizeAreTheForwardPass) {
  const Threads one(1);
  for (const auto& [name, attention] : settings) {
    SCOPED_TRACE(name);
    Case c(attention, DType::f64, 150);
    for (int run = 0; run < 12; ++run) {
      fill(c.decoder.read(), 0);
      Generator generator(c.decoder, c.N);
      const int64_t longest = run % 2 ? 100 : 20;
      for (int64_t t = 0, size = 0; t < c.N; t += size) {
        size = std::min<int64_t>(c.N - t, 1 + static_cast<int64_t>(c.pool.rng().below(longest)));
        ASSERT_LT(c.error(generator, t, size), 1e-9) << "tokens " << t << " and " << size;
      }
      EXPECT_EQ(values(c.decoder.read()), c.read);
    }
  }
}

TEST(Generator, RunsInSinglePrecisionAndSeveralThreads) {
  const Threads two(2);
  for (const char* method : {"full", "nsa", "infllmv2"}) {  // dash's prior amplifies rounding
    Case c({.method = method, .block = 16, .topk = 20, .l = 8, .d = 4}, DType::f32, 150);
    Generator generator(c.decoder, c.N);
    EXPECT_LT(c.error(generator, 0, 90), 1e-4) << method;
    for (int64_t t = 90; t < c.N; ++t) EXPECT_LT(c.error(generator, t, 1), 1e-4) << method;
  }
}

TEST(Generator, ATokenOfALongContextReadsFewChunks) {
  const int64_t N = 2000, chunk = 10, group = 2;
  Case c(dash(chunk, 0, 1, 1e6), DType::f64, N);
  Generator generator(c.decoder, N);
  generator.append(std::span(c.ids).first(N - 1));
  fill(c.decoder.read(), 0);
  generator.append(std::span(c.ids).last(1));
  for (int64_t head = 0; head < 4; ++head) {
    const double* fields = c.decoder.read().ptr<double>() + head * read_fields;
    EXPECT_EQ(fields[read_causal], N);
    EXPECT_EQ(fields[read_queries], 1);
    EXPECT_GE(fields[read_pairs], 2 * chunk);
    EXPECT_LE(fields[read_pairs], (group + 1) * chunk);
    EXPECT_EQ(fields[read_router], N / chunk - 1);
  }
}

TEST(Generator, RefusesMoreThanItsCapacity) {
  Case c({.method = "full"}, DType::f64, 20);
  Generator generator(c.decoder, 10);
  const std::span<const int32_t> ids = c.ids;
  EXPECT_ERROR(generator.append(ids.first(0)), "0 tokens to append to 0");
  EXPECT_ERROR(generator.append(ids.first(11)), "11 tokens to append to 0 where 10 is the most");
  EXPECT_LT(c.error(generator, 0, 8), 1e-9) << "a refusal leaves the sequence as it was";
  EXPECT_ERROR(generator.append(ids.first(3)), "3 tokens to append to 8");
  EXPECT_LT(c.error(generator, 8, 2), 1e-9);
  EXPECT_ERROR(Generator(c.decoder, 21), "the decoder was made for 20");
}

}  // namespace
}  // namespace entrain
