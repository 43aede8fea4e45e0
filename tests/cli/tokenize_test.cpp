#include <gtest/gtest.h>

#include "cli/commands.h"
#include "core/rng.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

void tokenize(const std::string& arguments) {
  CLI::App app;
  cli::add_tokenize(app);
  app.parse("tokenize " + arguments);
}

std::vector<int32_t> ids(const TokenStore& store, Split split) {
  std::vector<int32_t> ids(static_cast<size_t>(store.tokens(split)));
  store.read(split, 0, std::ssize(ids), ids.data());
  return ids;
}

/// Documents of words from a small vocabulary, and one of random bytes.
void write_corpus(const TempDir& dir) {
  Rng rng(5, 0);
  for (int d = 0; d < 120; ++d) {
    std::string text;
    for (uint64_t n = 200 + rng.below(800); n > 0; --n)
      text += fmt::format("word{}{}", rng.below(300), rng.below(9) ? " " : "\n    ");
    write_file(dir / fmt::format("corpus/{:03}.txt", d), text);
  }
  std::string bytes;
  for (int i = 0; i < 5000; ++i) bytes += static_cast<char>(1 + rng.below(255));
  write_file(dir / "corpus/random.txt", bytes);
}

TEST(Tokenize, DoesNotDependOnThreads) {
  TempDir dir;
  write_corpus(dir);
  const std::string shared = fmt::format("{} --tokenizer bpe:400 --validation 0.2", dir / "corpus");
  tokenize(fmt::format("{} --out {} --threads 1", shared, dir / "one.h5"));
  tokenize(fmt::format("{} --out {} --threads 3", shared, dir / "three.h5"));
  const TokenStore one(dir / "one.h5"), three(dir / "three.h5");
  EXPECT_EQ(one.fingerprint(), three.fingerprint());
  EXPECT_EQ(ids(one, Split::train), ids(three, Split::train));
  EXPECT_EQ(one.documents(Split::train) + one.documents(Split::validation), 121);
  EXPECT_NEAR(static_cast<double>(one.documents(Split::validation)), 24, 15);
}

TEST(Tokenize, KeepsEveryByteInOrder) {
  TempDir dir;
  write_corpus(dir);
  for (const std::string name : {"bytes", "bpe:400"}) {
    tokenize(fmt::format("{} --out {} --tokenizer {} --validation 0", dir / "corpus", dir / "a.h5",
                         name));
    const TokenStore store(dir / "a.h5");
    const Tokenizer tokenizer(store.tokenizer(), store.tokenizer_model());
    EXPECT_EQ(store.vocab(), tokenizer.vocab());
    std::string expected;
    for (int d = 0; d < 120; ++d) expected += read_file(dir / fmt::format("corpus/{:03}.txt", d));
    expected += read_file(dir / "corpus/random.txt");
    const auto train = ids(store, Split::train);
    EXPECT_TRUE(tokenizer.decode(train) == expected);
    EXPECT_EQ(std::count(train.begin(), train.end(), tokenizer.end_of_document()), 121);
    EXPECT_EQ(train.back(), tokenizer.end_of_document());
  }
}

TEST(Tokenize, DocumentsKeepTheirSplit) {
  TempDir dir;
  for (int d = 0; d < 60; ++d)
    write_file(dir / fmt::format("corpus/{:02}", d), fmt::format("document {}\n", d));
  tokenize(fmt::format("{} --out {} --validation 0.5", dir / "corpus", dir / "a.h5"));
  const std::string before = Tokenizer().decode(ids(TokenStore(dir / "a.h5"), Split::validation));
  for (int d = 0; d < 30; ++d) std::filesystem::remove(dir / fmt::format("corpus/{:02}", d));
  tokenize(fmt::format("{} --out {} --validation 0.5", dir / "corpus", dir / "a.h5"));
  const std::string after = Tokenizer().decode(ids(TokenStore(dir / "a.h5"), Split::validation));
  EXPECT_LT(after.size(), before.size());
  EXPECT_TRUE(before.ends_with(after));
}

TEST(Tokenize, RefusesBadInputAndLeavesNoFile) {
  TempDir dir;
  write_file(dir / "empty", "");
  write_file(dir / "a.txt", "some text\n");
  write_file(dir / "bad.json", "{");
  const std::string out = " --out " + (dir / "out.h5");
  EXPECT_ERROR(tokenize(dir / "absent" + out), "no such file");
  EXPECT_ERROR(tokenize(dir / "empty" + out), "no text");
  EXPECT_ERROR(tokenize(dir / "empty" + out + " --tokenizer bpe:300"), "no text");
  EXPECT_ERROR(tokenize(dir / "a.txt" + out + " --tokenizer bpe:30000"), "at most");
  EXPECT_ERROR(tokenize(dir / "a.txt" + out + " --tokenizer bpe:some"), "bpe:2048");
  EXPECT_ERROR(tokenize(dir / "a.txt" + out + " --tokenizer other"), "expected bytes");
  EXPECT_ERROR(tokenize(dir / "a.txt" + out + " --provenance " + (dir / "bad.json")), "not JSON");
  EXPECT_ERROR(tokenize(dir / "a.txt" + (" --out " + (dir / "no/out.h5"))), "No such file");
  EXPECT_FALSE(std::filesystem::exists(dir / "out.h5"));
  EXPECT_FALSE(std::filesystem::exists(dir / "out.h5.partial"));
}

TEST(Tokenize, KeepsProvenance) {
  TempDir dir;
  write_file(dir / "a.txt", "some text\n");
  write_file(dir / "source.json", R"({"licence": "PSF-2.0"})");
  tokenize(fmt::format("{} --out {} --validation 0 --provenance {}", dir / "a.txt", dir / "a.h5",
                       dir / "source.json"));
  EXPECT_NE(TokenStore(dir / "a.h5").provenance().find("PSF-2.0"), std::string::npos);
}

}  // namespace
}  // namespace entrain
