#include "data/token_store.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <optional>

#include "core/h5.h"
#include "data/token_writer.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

std::vector<int32_t> range(int32_t begin, int32_t end) {
  std::vector<int32_t> ids;
  for (int32_t i = begin; i < end; ++i) ids.push_back(i);
  return ids;
}

void write_store(const std::string& path, int vocab = 300) {
  TokenWriter writer(path, vocab);
  writer.add(Split::train, range(0, 100));
  writer.add(Split::validation, range(50, 60));
  writer.add(Split::train, range(100, 300));
  writer.finish({"spm:x", std::string("\0model", 6), R"({"licence": "none"})", "0 1 a\n"});
}

const std::string manifest = "0123abcd 17 corpus/a.txt\n";

/// The same with answers, one of them the first token of a document.
void write_answers(const std::string& path) {
  TokenWriter writer(path, 300);
  writer.add(Split::train, range(0, 100), std::vector<int64_t>{1, 40, 99});
  writer.add(Split::validation, range(50, 60));
  writer.add(Split::train, range(100, 300), std::vector<int64_t>{0, 199});
  writer.finish({"spm:x", std::string("\0model", 6), "{}", manifest});
}

const std::vector<int64_t> written_answers{1, 40, 99, 100, 299};

std::vector<int32_t> read_all(const TokenStore& store, Split split) {
  std::vector<int32_t> ids(static_cast<size_t>(store.tokens(split)));
  store.read(split, 0, std::ssize(ids), ids.data());
  return ids;
}

TEST(TokenStore, ReadsBackWhatWasWritten) {
  TempDir dir;
  write_store(dir / "a.h5");
  const TokenStore store(dir / "a.h5");
  EXPECT_EQ(store.vocab(), 300);
  EXPECT_EQ(store.tokenizer(), "spm:x");
  EXPECT_EQ(store.tokenizer_model(), std::string("\0model", 6));
  EXPECT_EQ(store.provenance(), R"({"licence": "none"})");
  EXPECT_EQ(store.documents(Split::train), 2);
  EXPECT_EQ(store.documents(Split::validation), 1);
  EXPECT_EQ(read_all(store, Split::train), range(0, 300));
  EXPECT_EQ(read_all(store, Split::validation), range(50, 60));
  std::vector<uint64_t> offsets(3);
  h5::File::open(dir / "a.h5")
      .read("train/document_offsets", Tensor::of(offsets.data(), {3}, DType::u64));
  EXPECT_EQ(offsets, (std::vector<uint64_t>{0, 100, 300}));
  int32_t id = 0;
  EXPECT_ERROR(store.read(Split::train, 300, 1, &id), "only 300");
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.partial"));
}

TEST(TokenStore, ReadsBackAnswers) {
  TempDir dir;
  write_answers(dir / "a.h5");
  const TokenStore store(dir / "a.h5");
  EXPECT_EQ(read_all(store, Split::train), range(0, 300));
  EXPECT_EQ(store.answers(Split::train), 5);
  EXPECT_EQ(store.answers(Split::train, 0, 300), written_answers);
  EXPECT_EQ(store.answers(Split::train, 40, 60), (std::vector<int64_t>{40, 99}));
  EXPECT_EQ(store.answers(Split::train, 41, 58), std::vector<int64_t>());
  EXPECT_EQ(store.answers(Split::train, 299, 1), std::vector<int64_t>{299});
  EXPECT_EQ(store.answers(Split::validation), 0);
  EXPECT_FALSE(h5::File::open(dir / "a.h5").has("validation/answers"));
  EXPECT_EQ(store.answers(Split::validation, 0, 10), std::vector<int64_t>());
  // A store without them is as it was, and another one.
  write_store(dir / "b.h5");
  const TokenStore plain(dir / "b.h5");
  EXPECT_EQ(plain.answers(Split::train), 0);
  EXPECT_NE(store.fingerprint(), plain.fingerprint());
}

TEST(TokenStore, RefusesAnswersOutOfPlace) {
  TempDir dir;
  const auto write = [&](const std::vector<int64_t>& answers) {
    TokenWriter writer(dir / "a.h5", 300);
    writer.add(Split::train, range(0, 100), answers);
    writer.finish({"spm:x", std::string("\0model", 6), "{}", ""});
  };
  write({1, 5, 99});
  EXPECT_EQ(TokenStore(dir / "a.h5").answers(Split::train), 3);
  for (const auto& [answers, part] : std::vector<std::pair<std::vector<int64_t>, std::string>>{
           {{5, 4}, "number 1 of train/answers is token 4, expected one after 5 and before 100"},
           {{5, 5}, "number 1 of train/answers is token 5"},
           {{0, 5}, "number 0 of train/answers is token 0, expected one after 0"},
           {{5, 100}, "number 1 of train/answers is token 100"},
           {{5, -1}, "number 1 of train/answers is token -1"}}) {
    write(answers);
    EXPECT_ERROR(TokenStore(dir / "a.h5"), part);
    EXPECT_ERROR(TokenStore(dir / "a.h5", false), part);
  }
}

TEST(TokenStore, WideIdsAndLongSplits) {
  TempDir dir;
  const int32_t n = 3000000;  // more than the writer buffers
  {
    TokenWriter writer(dir / "a.h5", n);
    writer.add(Split::train, range(0, n));
    writer.finish({"bytes", "", "{}", ""});
  }
  const TokenStore store(dir / "a.h5");
  EXPECT_EQ(read_all(store, Split::train), range(0, n));
  EXPECT_EQ(store.tokens(Split::validation), 0);
  EXPECT_EQ(store.documents(Split::validation), 0);
}

TEST(TokenStore, FingerprintFollowsContents) {
  TempDir dir;
  write_store(dir / "a.h5");
  write_store(dir / "b.h5");
  const std::string a = TokenStore(dir / "a.h5").fingerprint();
  EXPECT_EQ(a, TokenStore(dir / "b.h5").fingerprint());
  TokenWriter writer(dir / "c.h5", 300);
  writer.add(Split::train, range(0, 299));
  writer.finish({"spm:x", "", "{}", ""});
  EXPECT_NE(a, TokenStore(dir / "c.h5").fingerprint());
}

// No flipped bit and no cut may crash the reader or pass as another token.
TEST(TokenStore, EveryFlippedBitIsNoticedOrHarmless) {
  TempDir dir;
  write_answers(dir / "a.h5");
  const std::string whole = read_file(dir / "a.h5");
  int noticed = 0;
  for (size_t at = 0; at < whole.size(); at += 3) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << at % 8));
    write_file(dir / "b.h5", damaged);
    try {
      const TokenStore store(dir / "b.h5");
      const std::string kept = error_of([&] {
        const auto bytes = h5::File::open(dir / "b.h5").read("manifest").bytes;
        fail("{}", std::string_view(reinterpret_cast<const char*>(bytes.data()), bytes.size()));
      });
      ASSERT_EQ(kept, manifest) << "byte " << at;
      ASSERT_EQ(read_all(store, Split::train), range(0, 300)) << "byte " << at;
      ASSERT_EQ(store.tokenizer_model(), std::string("\0model", 6)) << "byte " << at;
      ASSERT_EQ(store.documents(Split::train), 2) << "byte " << at;
      ASSERT_EQ(store.answers(Split::train, 0, 300), written_answers) << "byte " << at;
    } catch (const Error& e) {
      ASSERT_EQ(std::string(e.what()).find('\n'), std::string::npos) << e.what();
      ++noticed;
    }
  }
  EXPECT_GT(noticed, 300);
}

TEST(TokenStore, DamagedTokensAreNamed) {
  TempDir dir;
  write_store(dir / "a.h5");
  const auto place = h5::File::open(dir / "a.h5").placed("train/tokens");
  std::string damaged = read_file(dir / "a.h5");
  damaged[static_cast<size_t>(place.offset) + 7] ^= 0x40;
  write_file(dir / "a.h5", damaged);
  EXPECT_ERROR(TokenStore(dir / "a.h5"), "the checksum of train/tokens does not match");
  // Unverified, the id that left the vocabulary is still refused.
  const TokenStore store(dir / "a.h5", false);
  EXPECT_ERROR(read_all(store, Split::train), "token 3 of train is 16387, beyond the vocabulary");
}

TEST(TokenStore, DamagedAnswersAreNamed) {
  TempDir dir;
  write_answers(dir / "a.h5");
  const auto place = h5::File::open(dir / "a.h5").placed("train/answers");
  std::string damaged = read_file(dir / "a.h5");
  damaged[static_cast<size_t>(place.offset) + 8] ^= 1;  // still in order
  write_file(dir / "a.h5", damaged);
  EXPECT_ERROR(TokenStore(dir / "a.h5"), "the checksum of train/answers does not match");
}

/// Copies a store, its manifest with another checksum or none.
void copy_store(const std::string& from, const std::string& to,
                std::optional<int64_t> manifest_crc) {
  const h5::File in = h5::File::open(from);
  h5::File out = h5::File::create(to);
  for (const char* name : {"format", "tokenizer", "provenance"})
    out.set("", name, in.text("", name));
  out.set("", "vocab_size", in.integer("", "vocab_size"));
  for (const std::string& name : in.datasets()) {
    out.write(name, in.read(name).tensor());
    const auto crc = name == "manifest" ? manifest_crc : in.integer(name, "crc32");
    if (crc) out.set(name, "crc32", *crc);
  }
  out.close();
}

TEST(TokenStore, VerifiesTheManifestWhereItHasAChecksum) {
  TempDir dir;
  write_store(dir / "a.h5");
  copy_store(dir / "a.h5", dir / "older.h5", {});
  EXPECT_EQ(TokenStore(dir / "older.h5").fingerprint(), TokenStore(dir / "a.h5").fingerprint());
  const int64_t crc = h5::File::open(dir / "a.h5").integer("manifest", "crc32");
  copy_store(dir / "a.h5", dir / "same.h5", crc);
  EXPECT_NO_THROW(TokenStore(dir / "same.h5"));
  copy_store(dir / "a.h5", dir / "other.h5", crc ^ 1);
  EXPECT_ERROR(TokenStore(dir / "other.h5"), "the checksum of manifest does not match");
  EXPECT_NO_THROW(TokenStore(dir / "other.h5", false));
}

TEST(TokenStore, TruncatedAnywhereIsAnError) {
  TempDir dir;
  write_store(dir / "a.h5");
  const std::string whole = read_file(dir / "a.h5");
  for (size_t size = 0; size < whole.size(); size += 41) {
    write_file(dir / "b.h5", whole.substr(0, size));
    const std::string message = error_of([&] { TokenStore(dir / "b.h5"); });
    EXPECT_EQ(message.rfind(dir / "b.h5", 0), 0u) << "of " << size << " bytes: " << message;
  }
}

TEST(TokenStore, RefusesForeignFiles) {
  TempDir dir;
  EXPECT_ERROR(TokenStore(dir / "absent.h5"), "No such file");
  h5::File::create(dir / "other.h5").close();
  EXPECT_ERROR(TokenStore(dir / "other.h5"), "not a token store");
}

TEST(TokenWriter, RefusesIdsBeyondTheVocabulary) {
  TempDir dir;
  TokenWriter writer(dir / "a.h5", 10);
  EXPECT_ERROR(writer.add(Split::train, range(9, 11)), "beyond the vocabulary");
}

TEST(TokenWriter, ReplacesNothingButTokenStores) {
  TempDir dir;
  const std::string refusal = ": exists and is no token store; choose another --out, or remove it";
  write_file(dir / "text", "abc\n");
  EXPECT_ERROR(TokenWriter(dir / "text", 10), (dir / "text") + refusal);
  write_file(dir / "empty", "");
  EXPECT_ERROR(TokenWriter(dir / "empty", 10), (dir / "empty") + refusal);
  h5::File::create(dir / "other.h5").close();
  EXPECT_ERROR(TokenWriter(dir / "other.h5", 10), (dir / "other.h5") + refusal);
  write_store(dir / "a.h5");
  std::filesystem::create_symlink(dir / "a.h5", dir / "link");
  EXPECT_ERROR(TokenWriter(dir / "link", 10), (dir / "link") + ": exists and is no ordinary file");
  EXPECT_EQ(read_file(dir / "text"), "abc\n");
  EXPECT_TRUE(std::filesystem::is_symlink(dir / "link"));
  EXPECT_NO_THROW(write_store(dir / "a.h5", 400));
  EXPECT_EQ(TokenStore(dir / "a.h5").vocab(), 400);
}

TEST(TokenWriter, LeavesNothingBehindUnlessFinished) {
  TempDir dir;
  EXPECT_ERROR(TokenWriter(dir / "no/a.h5", 10), "No such file");
  EXPECT_ERROR(TokenWriter(dir / "", 10), "folder");
  { TokenWriter(dir / "a.h5", 10).add(Split::train, range(0, 10)); }
  EXPECT_TRUE(std::filesystem::is_empty(dir / ""));

  write_store(dir / "a.h5");
  const std::string before = read_file(dir / "a.h5");
  rlimit limit;
  getrlimit(RLIMIT_FSIZE, &limit);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{1000000, limit.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  EXPECT_ERROR(
      {
        TokenWriter writer(dir / "a.h5", 300000);
        writer.add(Split::train, range(0, 299000));
        writer.finish({"bytes", "", "{}", ""});
      },
      "disk full?");
  setrlimit(RLIMIT_FSIZE, &limit);
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(read_file(dir / "a.h5"), before);
  EXPECT_FALSE(std::filesystem::exists(dir / "a.h5.partial"));
}

}  // namespace
}  // namespace entrain
