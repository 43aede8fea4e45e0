#include <gtest/gtest.h>

#include "cli/commands.h"
#include "core/rng.h"
#include "data/token_store.h"
#include "data/tokenizer.h"
#include "tests/expect_error.h"
#include "tests/program.h"
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
  EXPECT_ERROR(tokenize((dir / "a.txt") + " --out " + (dir / "a.txt")), "is no token store");
  EXPECT_EQ(read_file(dir / "a.txt"), "some text\n");
}

TEST(Tokenize, MakesARecallTask) {
  TempDir dir;
  const auto recall = [&](const std::string& name, const std::string& arguments) {
    tokenize(
        fmt::format("--synthetic recall --length 64 --documents 300 --validation 0.2 {} --out {}",
                    arguments, dir / name));
  };
  recall("a.h5", "--distance 20 --pairs 3");
  const TokenStore store(dir / "a.h5");
  EXPECT_EQ(store.documents(Split::train) + store.documents(Split::validation), 300);
  EXPECT_NEAR(static_cast<double>(store.documents(Split::validation)), 60, 25);
  for (const Split split : {Split::train, Split::validation}) {
    EXPECT_EQ(store.tokens(split), 64 * store.documents(split));
    EXPECT_EQ(store.answers(split), 3 * store.documents(split));
    const std::vector<int32_t> all = ids(store, split);
    for (const int64_t at : store.answers(split, 0, store.tokens(split))) {
      const auto i = static_cast<size_t>(at);
      EXPECT_EQ(all[i - 1], '?');
      EXPECT_EQ(all[i - 21], '=');
      EXPECT_EQ(all[i], all[i - 20]);
    }
    for (size_t end = 63; end < all.size(); end += 64)
      EXPECT_EQ(all[end], Tokenizer().end_of_document());
  }
  EXPECT_NE(store.provenance().find("\"pairs\": 3"), std::string::npos) << store.provenance();

  recall("same.h5", "--distance 20:20 --pairs 3 --threads 2");
  EXPECT_EQ(TokenStore(dir / "same.h5").fingerprint(), store.fingerprint());
  recall("other.h5", "--distance 20 --pairs 3 --seed 2");
  EXPECT_NE(TokenStore(dir / "other.h5").fingerprint(), store.fingerprint());
}

TEST(Tokenize, RefusesImpossibleRecallTasks) {
  TempDir dir;
  write_file(dir / "a.txt", "some text\n");
  const std::string task = "--synthetic recall --length 256 --distance 128 --documents 9 --pairs 2";
  for (const auto& [arguments, part] : std::vector<std::pair<std::string, std::string>>{
           {task + " --pairs 3", "--pairs"},  // twice
           {"--synthetic recall --length 256 --distance 128 --documents 9 --pairs 22",
            "--pairs 22: expected 1 to 21"},
           {"--synthetic recall --length 256 --distance 250 --documents 9 --pairs 2",
            "--distance 250: expected at most 249"},
           {"--synthetic recall --length 256 --distance far --documents 9 --pairs 2",
            "--distance far: expected a number"},
           {"--synthetic recall --length 256 --distance 64: --documents 9 --pairs 2",
            "--distance 64:: expected a number"},
           {"--synthetic recall --length 0 --distance 64 --documents 9 --pairs 2", "--length"},
           {"--synthetic recall --length 256 --documents 9 --pairs 2", "requires --distance"},
           {"--synthetic recital --length 256 --distance 64 --documents 9 --pairs 2", "recital"},
           {task + " --tokenizer bpe:300", "--tokenizer bpe:300: --synthetic recall"},
           {task + " --jsonl-field text", "--jsonl-field excludes --synthetic"},
           {(dir / "a.txt") + " " + task, "input excludes --synthetic"},
           {(dir / "a.txt") + " --pairs 2", "requires --synthetic"},
           {"", "name inputs, or --synthetic recall"}}) {
    const Ended ended = run_entrain(fmt::format("tokenize {} --out {}", arguments, dir / "a.h5"));
    EXPECT_EQ(ended.code, 2) << arguments;
    EXPECT_EQ(ended.out, "") << arguments;
    EXPECT_NE(ended.err.find(part), std::string::npos) << arguments << ": " << ended.err;
    EXPECT_EQ(std::ranges::count(ended.err, '\n'), 1) << ended.err;
    EXPECT_FALSE(std::filesystem::exists(dir / "a.h5")) << arguments;
  }
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
