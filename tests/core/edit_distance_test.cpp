#include "core/edit_distance.h"

#include <gtest/gtest.h>

namespace entrain {
namespace {

TEST(EditDistance, CountsLetters) {
  EXPECT_EQ(edit_distance("", ""), 0u);
  EXPECT_EQ(edit_distance("", "abc"), 3u);
  EXPECT_EQ(edit_distance("chunks", "chunk"), 1u);
  EXPECT_EQ(edit_distance("gama", "gamma"), 1u);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3u);
}

TEST(EditDistance, TakesASwapOfNeighboursForOne) {
  EXPECT_EQ(edit_distance("trian", "train"), 1u);
  EXPECT_EQ(edit_distance("abcd", "badc"), 2u);
}

}  // namespace
}  // namespace entrain
