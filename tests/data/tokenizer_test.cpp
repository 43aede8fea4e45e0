#include "data/tokenizer.h"

#include <gtest/gtest.h>
#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include "core/rng.h"
#include "tests/expect_error.h"

namespace entrain {
namespace {

std::vector<std::string> code_sample() {
  std::vector<std::string> sample;
  for (int i = 0; i < 200; ++i)
    sample.push_back(fmt::format(
        "def name_{}(self, value):\n\tif value:\n        return self.grow(value * {})\n\n"
        "    größer, naïve, 値\n",
        i, i * 7));
  return sample;
}

const Tokenizer& bpe() {
  static const Tokenizer tokenizer("bpe:600", train_bpe(code_sample(), 600));
  return tokenizer;
}

/// Everything that a normalizing or space-replacing encoder could lose.
std::vector<std::string> tricky() {
  using namespace std::string_literals;
  std::vector<std::string> texts = {
      "",
      " ",
      "   leading and trailing   ",
      "tabs\t\t and \r\n line ends \r \n\n\n",
      "NUL \0 inside"s,
      "\0"s,
      "\xE2\x96\x81 the space symbol \xE2\x96\x81\xE2\x96\x81x \xE2\x96",
      "\xE2\x96\x85 the trainer's own mark",
      "invalid \xFF\xFE \xC0\x80 \xED\xA0\x80 \xF4\x90\x80\x80 \xE2\x82",
      "<unk> </s> <s> <0x41> <pad>",
      "\xEF\xBB\xBF mark \xEF\xBF\xBD replacement \xE2\x80\x8B zero width \xC2\xA0",
      "e\xCC\x81 and \xC3\xA9, \xEF\xBC\xA1 full width, \xF0\x9F\x98\x80",
      std::string("control \x01\x02\x1B\x7F")};
  texts.push_back(std::string(20000, ' '));
  texts.push_back(std::string(9000, 'a') + std::string(5000, '\n'));
  std::string wide;
  for (int i = 0; i < 5000; ++i) wide += "値";
  texts.push_back("a" + wide);
  return texts;
}

void expect_round_trip(const Tokenizer& tokenizer, const std::string& text) {
  const auto ids = tokenizer.encode(text);
  for (int32_t id : ids) ASSERT_TRUE(id >= 0 && id < tokenizer.vocab());
  EXPECT_EQ(std::count(ids.begin(), ids.end(), tokenizer.end_of_document()), 0);
  EXPECT_EQ(tokenizer.decode(ids), text);
}

void expect_round_trips(const Tokenizer& tokenizer) {
  for (const std::string& text : tricky()) expect_round_trip(tokenizer, text);
  for (const std::string& text : code_sample()) expect_round_trip(tokenizer, text);
  Rng rng(11, 0);
  for (int i = 0; i < 300; ++i) {
    // Bytes that are mostly the parts of multi-byte characters, spaces and the space symbol.
    const std::string alphabet = "\xE2\x96\x81 \n\tab\xC3\xA9\xF0\x9F";
    std::string text;
    for (uint64_t n = rng.below(400); n > 0; --n)
      text += i % 2 ? static_cast<char>(rng.below(256)) : alphabet[rng.below(alphabet.size())];
    expect_round_trip(tokenizer, text);
  }
}

TEST(Tokenizer, BytesRoundTrip) {
  const Tokenizer tokenizer;
  EXPECT_EQ(tokenizer.vocab(), 257);
  EXPECT_EQ(tokenizer.end_of_document(), 256);
  EXPECT_EQ(tokenizer.encode("A\xFF"), (std::vector<int32_t>{65, 255}));
  expect_round_trips(tokenizer);
}

TEST(Tokenizer, BpeRoundTrip) {
  EXPECT_EQ(bpe().vocab(), 600);
  expect_round_trips(bpe());
}

TEST(Tokenizer, BpeMergesWordsIndentationAndLineEnds) {
  const std::string text = code_sample()[100];
  EXPECT_LT(bpe().encode(text).size(), text.size() / 3);
  EXPECT_EQ(bpe().encode("        ").size(), 1u);
  EXPECT_LT(bpe().encode(":\n").size(), 2u);
}

TEST(Tokenizer, IsRestoredFromNameAndModel) {
  const Tokenizer again(bpe().name(), bpe().model());
  EXPECT_EQ(again.vocab(), bpe().vocab());
  EXPECT_EQ(again.encode(code_sample()[3]), bpe().encode(code_sample()[3]));
}

// A model as others train them: normalizing, with a dummy prefix, without bytes or end of document.
TEST(Tokenizer, GivenModelLosesNothing) {
  struct Lines : sentencepiece::SentenceIterator {
    std::vector<std::string> lines = code_sample();
    size_t at = 0;
    bool done() const override { return at == lines.size(); }
    void Next() override { ++at; }
    const std::string& value() const override { return lines[at]; }
    sentencepiece::util::Status status() const override { return {}; }
  } lines;
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(
      {{"model_type", "unigram"}, {"vocab_size", "90"}, {"eos_id", "-1"}, {"minloglevel", "2"}},
      &lines, &model);
  ASSERT_TRUE(status.ok()) << status.ToString();
  const Tokenizer tokenizer("spm:other.model", model);
  EXPECT_EQ(tokenizer.vocab(), 90 + 256 + 1);
  EXPECT_EQ(tokenizer.end_of_document(), 90 + 256);
  expect_round_trips(tokenizer);
}

TEST(Tokenizer, SegmentsEndAtLinesOrCharacters) {
  EXPECT_EQ(segment_length("short", 10), 5u);
  EXPECT_EQ(segment_length("one\ntwo\nthree", 10), 8u);
  EXPECT_EQ(segment_length("値値値値", 10), 9u);
  EXPECT_EQ(segment_length("値値値値", 9), 9u);
  EXPECT_EQ(segment_length("\x80\x80\x80\x80\x80\x80\x80\x80", 6), 6u);
}

TEST(Tokenizer, RefusesWhatItCannotDo) {
  EXPECT_ERROR(train_bpe(code_sample(), 30000), "supports at most");
  EXPECT_ERROR(train_bpe(code_sample(), 260), "or more");
  EXPECT_ERROR(Tokenizer("spm:x", "not a model"), "not a SentencePiece model");
  EXPECT_ERROR(Tokenizer("spm:x", ""), "not a SentencePiece model");
  EXPECT_ERROR(Tokenizer().decode(std::vector<int32_t>{257}), "beyond the vocabulary");
}

}  // namespace
}  // namespace entrain
