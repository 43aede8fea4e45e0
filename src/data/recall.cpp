#include "data/recall.h"

#include <algorithm>

#include "core/error.h"
#include "core/rng.h"

namespace entrain {
namespace {

constexpr int64_t line_length = 6;  // "\nqk=V\n" and "\nqk?V\n"
constexpr int64_t value_at = 4;     // in a line
constexpr int64_t letters = 26, keys = letters * letters;

std::vector<std::string> make_words() {
  Rng rng(0, 0);
  std::vector<std::string> words(64);
  for (std::string& word : words) {
    word.resize(2 + rng.below(6));
    for (char& c : word) c = static_cast<char>('a' + rng.below(letters));
  }
  return words;
}

/// Words and spaces, the last word cut.
std::string filler(Rng& rng, size_t length) {
  static const std::vector<std::string> words = make_words();
  std::string text;
  while (text.size() < length) text += words[rng.below(words.size())] + ' ';
  text.resize(length);
  return text;
}

/// Tokens that the statements of a document may lie in: their questions lie as far apart, so both
/// stretches must fit behind one another.
int64_t room(const RecallTask& task, int64_t distance) {
  return std::min(distance, task.length - 1 - distance);
}

}  // namespace

void check(const RecallTask& task) {
  const auto& [length, low, high, pairs, seed] = task;
  require(length > 2 * line_length,
          "--length {}: expected at least {}, a statement, a question and the end of the document",
          length, 2 * line_length + 1);
  require(low <= high, "--distance {}:{}: expected the smaller number first", low, high);
  require(low >= line_length, "--distance {}: expected at least {}, the length of a statement", low,
          line_length);
  require(high < length - line_length,
          "--distance {}: expected at most {} in documents of --length {}", high,
          length - line_length - 1, length);
  const int64_t most = std::min(keys, std::min(room(task, low), room(task, high)) / line_length);
  require(pairs >= 1 && pairs <= most,
          "--pairs {}: expected 1 to {}, what fits at this --distance in documents of --length {} "
          "with {} different keys",
          pairs, most, length, keys);
}

RecallDocument recall_document(const RecallTask& task, uint64_t number) {
  Rng rng(task.seed, number);
  const auto draw = [&](int64_t bound) {
    return static_cast<int64_t>(rng.below(static_cast<uint64_t>(bound)));
  };
  RecallDocument document{.text = filler(rng, static_cast<size_t>(task.length - 1)), .answers = {}};
  const int64_t distance = task.min_distance + draw(task.max_distance - task.min_distance + 1);
  const int64_t stretch = room(task, distance);
  const int64_t begin = draw(task.length - distance - stretch);
  // Free tokens before each statement: statements then never overlap.
  std::vector<int64_t> before(static_cast<size_t>(task.pairs));
  for (int64_t& free : before) free = draw(stretch - task.pairs * line_length + 1);
  std::ranges::sort(before);
  std::vector<bool> taken(keys);
  for (size_t i = 0; i < before.size(); ++i) {
    int64_t key = draw(keys);
    while (taken[static_cast<size_t>(key)]) key = draw(keys);
    taken[static_cast<size_t>(key)] = true;
    std::string line{
        '\n', static_cast<char>('a' + key / letters), static_cast<char>('a' + key % letters),
        '=',  static_cast<char>('A' + draw(letters)), '\n'};
    const int64_t at = begin + before[i] + static_cast<int64_t>(i) * line_length;
    document.text.replace(static_cast<size_t>(at), line.size(), line);
    line[3] = '?';
    document.text.replace(static_cast<size_t>(at + distance), line.size(), line);
    document.answers.push_back(at + distance + value_at);
  }
  return document;
}

}  // namespace entrain
