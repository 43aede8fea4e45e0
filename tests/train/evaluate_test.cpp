#include "train/evaluate.h"

#include <gtest/gtest.h>

#include "data/token_writer.h"
#include "tests/temp_dir.h"
#include "tests/tiny_decoder.h"

namespace entrain {
namespace {

constexpr int64_t seq_len = 13;

/// The token with the largest logit at each position.
std::vector<int32_t> most_likely(Decoder& decoder, const Tensor& tokens) {
  Tensor logits;
  Graph graph({}, [&](Tape& tape) { logits = decoder.logits(tape, tokens); });
  graph->forward();
  std::vector<int32_t> best;
  for (int64_t t = 0; t < logits[0]; ++t) {
    const float* row = logits.ptr<float>() + t * logits[1];
    best.push_back(static_cast<int32_t>(std::max_element(row, row + logits[1]) - row));
  }
  return best;
}

TEST(Evaluator, CountsTheAnswersThatAreTheLargestLogit) {
  TempDir dir;
  TinyDecoder tiny("full", DType::f32, 1, seq_len);
  constexpr int64_t count = 60;  // 4 sequences, 7 tokens beyond their targets
  std::vector<int32_t> ids;
  std::vector<int64_t> answers;
  for (int64_t i = 0; i < count; ++i) {
    ids.push_back(static_cast<int32_t>(tiny.pool.rng().below(TinyDecoder::vocab)));
    // Among them the last target of a sequence, and the token that it shares with the next.
    if (i % seq_len == 0 || i % 5 == 2) answers.push_back(i);
  }
  answers.erase(answers.begin());  // nothing comes before the first token
  // Half of the answers as the model has them, which changes what it has for those after them.
  const auto window = [&](int64_t first) {
    std::copy_n(ids.begin() + first, seq_len, tiny.tokens.ptr<int32_t>());
    return tiny.tokens;
  };
  for (size_t i = 0; i < answers.size(); i += 2) {
    const int64_t first = (answers[i] - 1) / seq_len * seq_len;
    if (first + seq_len > count) continue;
    const std::vector<int32_t> best = most_likely(tiny.decoder, window(first));
    ids[static_cast<size_t>(answers[i])] = best[static_cast<size_t>(answers[i] - 1 - first)];
  }
  TokenWriter writer(dir / "a.h5", TinyDecoder::vocab);
  writer.add(Split::validation, ids, answers);
  writer.finish({"bytes", "", "{}", ""});

  int64_t asked = 0, right = 0;
  for (int64_t first = 0; first + seq_len < count; first += seq_len) {
    const std::vector<int32_t> best = most_likely(tiny.decoder, window(first));
    for (int64_t t = 0; t < seq_len; ++t) {
      if (!std::ranges::count(answers, first + 1 + t)) continue;
      ++asked;
      right += best[static_cast<size_t>(t)] == ids[static_cast<size_t>(first + 1 + t)];
    }
  }
  ASSERT_GT(right, asked / 3);
  ASSERT_LT(right, asked);

  TapeMemory memory(Device::cpu);
  { const Evaluator counted(tiny.decoder, memory, seq_len); }
  memory.commit();
  Evaluator evaluator(tiny.decoder, memory, seq_len);
  const std::unique_ptr<Comm> comm = make_comm();
  const TokenStore store(dir / "a.h5");
  for (int i = 0; i < 2; ++i) {
    const Recall recall = evaluator.run(store, Split::validation, 100, *comm).recall;
    EXPECT_EQ(recall.answers, asked);
    EXPECT_EQ(recall.right, right);
    EXPECT_DOUBLE_EQ(recall.accuracy(), static_cast<double>(right) / static_cast<double>(asked));
  }
}

}  // namespace
}  // namespace entrain
