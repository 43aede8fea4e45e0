#include "data/corpus.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "data/tokenizer.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

std::vector<std::string> all(Corpus& corpus) {
  std::vector<std::string> documents;
  for (std::string document; corpus.next(document);) documents.push_back(document);
  return documents;
}

std::vector<std::string> all(const std::vector<std::string>& inputs,
                             const std::string& field = "") {
  Corpus corpus(inputs, {field, false});
  return all(corpus);
}

using Texts = std::vector<std::string>;

TEST(Corpus, FoldersAreSortedWithoutHiddenAndBinaryFiles) {
  TempDir dir;
  write_file(dir / "c/b.txt", "second\n");
  write_file(dir / "c/a/x.txt", "first \xFF\r\n");
  write_file(dir / "c/.git/config", "hidden");
  write_file(dir / "c/.hidden", "hidden");
  write_file(dir / "c/empty", "");
  write_file(dir / "c/image", std::string("PNG\0\1", 5));
  write_file(dir / "c/z.jsonl",
             "{\"text\": \"third\"}\n\n{\"text\": \"\"}\n{\"text\": \"f\\u00fcnf\"}");
  Corpus corpus({dir / "c"}, {"", true});
  const Texts expected = {"first \xFF\r\n", "second\n", "third", "fünf"};
  EXPECT_EQ(all(corpus), expected);
  EXPECT_EQ(corpus.binaries_skipped(), 1);
  EXPECT_EQ(corpus.files_read(), 4);  // the empty one too
  EXPECT_EQ(corpus.bytes_read(), corpus.bytes_total());
  const std::string manifest = corpus.manifest();
  EXPECT_NE(manifest.find(" 7 " + (dir / "c/b.txt") + "\n"), std::string::npos) << manifest;
  corpus.rewind();
  EXPECT_EQ(all(corpus), expected);
  EXPECT_EQ(corpus.manifest(), manifest);
}

TEST(Corpus, NamedFilesAndGlobs) {
  TempDir dir;
  write_file(dir / "b.txt", std::string("b\0", 2));
  write_file(dir / "a.txt", "a");
  write_file(dir / "[odd]", "odd");
  EXPECT_EQ(all({dir / "b.txt", dir / "a.txt"}), (Texts{std::string("b\0", 2), "a"}));
  EXPECT_EQ(all({dir / "*.txt"}), (Texts{"a", std::string("b\0", 2)}));
  EXPECT_EQ(all({dir / "[odd]"}), Texts{"odd"});
  EXPECT_ERROR(all({dir / "*.rst"}), "no such file");
  EXPECT_ERROR(all({dir / "absent"}), "absent: no such file");
}

TEST(Corpus, LongTextsAreCutAtLineEnds) {
  TempDir dir;
  std::string text;
  for (int i = 0; text.size() < 3500000; ++i) text += fmt::format("line {}\n", i);
  write_file(dir / "a.txt", text);
  const Texts documents = all({dir / "a.txt"});
  EXPECT_EQ(documents.size(), 4u);
  std::string joined;
  for (const std::string& document : documents) {
    EXPECT_LE(document.size(), size_t{1} << 20);
    EXPECT_EQ(document.back(), '\n');
    joined += document;
  }
  EXPECT_TRUE(joined == text);
}

TEST(Corpus, JsonLines) {
  TempDir dir;
  const std::string large(3000000, 'x');
  write_file(dir / "a.dat", "{\"body\": \"one\"}\r\n{\"body\": \"" + large + "\"}\n");
  EXPECT_EQ(all({dir / "a.dat"}, "body"), (Texts{"one", large}));
  EXPECT_ERROR(all({dir / "a.dat"}, "text"), "a.dat:1: no text under \"text\"");
  write_file(dir / "b.jsonl", "{\"text\": \"one\"}\n{\"text\": \n");
  EXPECT_ERROR(all({dir / "b.jsonl"}), "b.jsonl:2: not a JSON object");
  write_file(dir / "c.jsonl", "[1]\n");
  EXPECT_ERROR(all({dir / "c.jsonl"}), "c.jsonl:1: not a JSON object");
}

TEST(Corpus, JsonStringsNeedNotBeUtf8) {
  TempDir dir;
  const auto read = [&](const std::string& line, const std::string& field = "") {
    write_file(dir / "a.jsonl", line + "\n");
    return all({dir / "a.jsonl"}, field);
  };
  // Latin-1 beside whole UTF-8 and escapes, also of what stands for bytes while they are parsed.
  EXPECT_EQ(read("{\"n\": [1, {\"\xE9\": \"\xFF\"}], \"text\": \"caf\xE9 \xC3\xA9 \\u00e9 "
                 "\\ud83d\\ude00 \\n\\\\u007f \x7F \x7Foj \\u007f\\u007Foj\"}"),
            (Texts{"caf\xE9 \xC3\xA9 \xC3\xA9 \xF0\x9F\x98\x80 \n\\u007f \x7F \x7Foj \x7F\x7Foj"}));
  EXPECT_EQ(read("{\"t\xE9\": \"a\\\\\xE9\\\"\"}", "t\xE9"), (Texts{"a\\\xE9\""}));
  EXPECT_EQ(read("{\"t\\u00e9\": \"\xE9\"}", "té"), Texts{"\xE9"});
  std::string bytes, line = "{\"text\": \"";
  for (int byte = 1; byte < 256; ++byte) {
    const char c = static_cast<char>(byte);
    bytes += c;
    if (c == '"' || c == '\\') line += '\\';
    if (byte < 0x20) line += fmt::format("\\u{:04x}", byte);
    if (byte >= 0x20) line += c;
  }
  EXPECT_EQ(read(line + "\"}"), Texts{bytes});
  const Tokenizer tokenizer;
  EXPECT_EQ(tokenizer.decode(tokenizer.encode(bytes)), bytes);

  EXPECT_ERROR(read("{\"text\": \"a\xE9"), "a.jsonl:1: not a JSON object");
  EXPECT_ERROR(read("{\"text\": \xE9}"), "a.jsonl:1: not a JSON object");
  EXPECT_ERROR(read("{\"text\": \"\\\xE9\"}"), "a.jsonl:1: not a JSON object");
  EXPECT_ERROR(read("{\"t\xE8xt\": \"a\"}", "t\xE9xt"), "no text under");
}

TEST(Corpus, HalvesOfSurrogatePairsBecomeReplacementCharacters) {
  TempDir dir;
  const auto read = [&](const std::string& text) {
    write_file(dir / "a.jsonl", "{\"text\": \"" + text + "\"}\n");
    return all({dir / "a.jsonl"});
  };
  const std::string odd = "\xEF\xBF\xBD", smile = "\xF0\x9F\x98\x80";
  EXPECT_EQ(read("\\ud800"), Texts{odd});
  EXPECT_EQ(read("a\\uDFFFb\\udbff"), Texts{"a" + odd + "b" + odd});
  EXPECT_EQ(read("\\ud83d\\ud83d\\ude00\\ude00"), Texts{odd + smile + odd});
  EXPECT_EQ(read("\\uD83D\\uDE00\\ud800\\u0041\\u007f\\ue000\xE9"),
            Texts{smile + odd + "A\x7F\xEE\x80\x80\xE9"});
  EXPECT_EQ(read("\\\\ud800 \\ud800"), Texts{"\\ud800 " + odd});  // the first escapes a backslash
  EXPECT_ERROR(read("\\ud8"), "a.jsonl:1: not a JSON object");
  EXPECT_ERROR(read("\\ud8zz"), "a.jsonl:1: not a JSON object");
}

TEST(Corpus, StandardInputTwice) {
  TempDir dir;
  write_file(dir / "in", "from a pipe\n");
  const int before = dup(STDIN_FILENO), in = open((dir / "in").c_str(), O_RDONLY);
  dup2(in, STDIN_FILENO), close(in);
  Corpus corpus({"-"}, {"", true});
  dup2(before, STDIN_FILENO), close(before);
  EXPECT_EQ(all(corpus), Texts{"from a pipe\n"});
  corpus.rewind();
  EXPECT_EQ(all(corpus), Texts{"from a pipe\n"});
  EXPECT_ERROR(all({"-", "-"}), "only once");
}

}  // namespace
}  // namespace entrain
