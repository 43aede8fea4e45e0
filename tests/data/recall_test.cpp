#include "data/recall.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "tests/expect_error.h"

namespace entrain {
namespace {

constexpr RecallTask task{
    .length = 256, .min_distance = 100, .max_distance = 100, .pairs = 16, .seed = 3};

/// Where the lines with a mark ("=" or "?") begin.
std::vector<int64_t> lines(const std::string& text, char mark) {
  std::vector<int64_t> found;
  for (size_t at = 0; (at = text.find(mark, at)) != std::string::npos; ++at)
    found.push_back(static_cast<int64_t>(at) - 3);
  return found;
}

/// Every promise of recall.h about one document but its length; its distance.
int64_t expect_document(const RecallTask& t, const RecallDocument& document) {
  const std::string& text = document.text;
  const std::vector<int64_t> statements = lines(text, '='), questions = lines(text, '?');
  EXPECT_EQ(std::ssize(statements), t.pairs);
  EXPECT_EQ(std::ssize(questions), t.pairs);
  EXPECT_EQ(std::ssize(document.answers), t.pairs);
  std::set<std::string> keys;
  std::string filler = text;
  const int64_t distance = questions.at(0) - statements.at(0);
  for (size_t i = 0; i < statements.size(); ++i) {
    std::string line = text.substr(static_cast<size_t>(statements[i]), 6);
    EXPECT_TRUE(line[0] == '\n' && line[5] == '\n') << text;
    EXPECT_TRUE(std::islower(line[1]) && std::islower(line[2]) && std::isupper(line[4])) << line;
    EXPECT_TRUE(keys.insert(line.substr(1, 2)).second) << "twice: " << line;
    line[3] = '?';
    EXPECT_EQ(questions[i], statements[i] + distance);
    EXPECT_EQ(text.substr(static_cast<size_t>(questions[i]), 6), line);
    EXPECT_EQ(document.answers[i], questions[i] + 4);
    for (const int64_t at : {statements[i], questions[i]})
      filler.replace(static_cast<size_t>(at), 6, 6, ' ');
  }
  EXPECT_TRUE(std::ranges::all_of(filler, [](char c) { return c == ' ' || std::islower(c); }))
      << text;
  return distance;
}

TEST(Recall, AsksForEachPairAtItsDistance) {
  for (uint64_t number = 0; number < 200; ++number) {
    const RecallDocument document = recall_document(task, number);
    EXPECT_EQ(document.text.size(), 255u);
    EXPECT_EQ(expect_document(task, document), 100);
  }
}

TEST(Recall, DrawsADistanceForEachDocument) {
  RecallTask t = task;
  t.min_distance = 98, t.max_distance = 103;
  std::map<int64_t, int> seen;
  for (uint64_t number = 0; number < 600; ++number)
    ++seen[expect_document(t, recall_document(t, number))];
  EXPECT_EQ(seen.begin()->first, 98);
  EXPECT_EQ(seen.rbegin()->first, 103);
  for (const auto& [distance, count] : seen) EXPECT_NEAR(count, 100, 40) << distance;
}

TEST(Recall, ValuesAreEvenAndPlacesVary) {
  std::map<char, int> values;
  std::set<int64_t> places;
  for (uint64_t number = 0; number < 1000; ++number) {
    const RecallDocument document = recall_document(task, number);
    for (const int64_t at : document.answers) ++values[document.text[static_cast<size_t>(at)]];
    places.insert(document.answers.begin(), document.answers.end());
  }
  EXPECT_EQ(values.size(), 26u);
  for (const auto& [value, count] : values) EXPECT_NEAR(count, 16000 / 26, 125) << value;
  // From the first place with a statement before it to the last in the document.
  EXPECT_EQ(*places.begin(), 104);
  EXPECT_EQ(*places.rbegin(), 253);
  EXPECT_EQ(places.size(), 150u);
}

TEST(Recall, DependsOnSeedAndNumberAlone) {
  const RecallDocument document = recall_document(task, 7);
  EXPECT_EQ(recall_document(task, 7).text, document.text);
  EXPECT_EQ(recall_document(task, 7).answers, document.answers);
  EXPECT_NE(recall_document(task, 8).text, document.text);
  RecallTask other = task;
  other.seed = 4;
  EXPECT_NE(recall_document(other, 7).text, document.text);
}

TEST(Recall, FillsTheTightestDocuments) {
  // As many pairs as fit, and the shortest document of all.
  for (const RecallTask& t : {RecallTask{256, 96, 96, 16, 1}, RecallTask{256, 128, 128, 21, 1},
                              RecallTask{13, 6, 6, 1, 1}, RecallTask{256, 249, 249, 1, 1}}) {
    check(t);
    for (uint64_t number = 0; number < 50; ++number)
      EXPECT_EQ(expect_document(t, recall_document(t, number)), t.min_distance);
  }
}

TEST(Recall, NamesTheBoundThatIsExceeded) {
  EXPECT_ERROR(check({12, 6, 6, 1, 1}), "--length 12: expected at least 13");
  EXPECT_ERROR(check({256, 5, 20, 1, 1}), "--distance 5: expected at least 6");
  EXPECT_ERROR(check({256, 20, 250, 1, 1}), "--distance 250: expected at most 249");
  EXPECT_ERROR(check({256, 30, 20, 1, 1}), "--distance 30:20: expected the smaller number first");
  EXPECT_ERROR(check({256, 96, 96, 17, 1}), "--pairs 17: expected 1 to 16");
  EXPECT_ERROR(check({256, 128, 128, 22, 1}), "--pairs 22: expected 1 to 21");
  EXPECT_ERROR(check({256, 96, 200, 10, 1}), "--pairs 10: expected 1 to 9");
  EXPECT_ERROR(check({256, 96, 96, 0, 1}), "--pairs 0: expected 1 to 16");
  EXPECT_ERROR(check({100000, 50000, 50000, 677, 1}), "--pairs 677: expected 1 to 676");
}

}  // namespace
}  // namespace entrain
