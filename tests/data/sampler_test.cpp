#include "data/sampler.h"

#include <gtest/gtest.h>

#include <set>

#include "data/token_writer.h"
#include "tests/expect_error.h"
#include "tests/temp_dir.h"

namespace entrain {
namespace {

constexpr int seq_len = 8;

/// A store whose train token i is i.
void write_store(const std::string& path, int tokens) {
  TokenWriter writer(path, 1000);
  std::vector<int32_t> ids(static_cast<size_t>(tokens));
  for (int i = 0; i < tokens; ++i) ids[static_cast<size_t>(i)] = i;
  writer.add(Split::train, ids);
  writer.finish({"bytes", "", "{}", ""});
}

struct Batch {
  explicit Batch(int64_t n) : tokens(static_cast<size_t>(n * seq_len)), targets(tokens.size()) {}
  std::vector<int32_t> tokens, targets;
};

Batch draw(Sampler& sampler, int64_t first, int64_t n) {
  Batch batch(n);
  sampler.fill(first, Tensor::of(batch.tokens.data(), {n, seq_len}, DType::i32),
               Tensor::of(batch.targets.data(), {n, seq_len}, DType::i32));
  return batch;
}

TEST(Sampler, AnEpochIsEverySequenceOnce) {
  TempDir dir;
  write_store(dir / "a.h5", 10 * seq_len + 1);
  const TokenStore store(dir / "a.h5");
  Sampler sampler(store, seq_len, 3);
  ASSERT_EQ(sampler.sequences(), 10);
  std::vector<std::vector<int32_t>> orders;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    const Batch batch = draw(sampler, epoch * 10, 10);
    std::vector<int32_t> order;
    for (size_t i = 0; i < batch.tokens.size(); ++i) {
      if (i % seq_len == 0) order.push_back(batch.tokens[i]);
      EXPECT_EQ(batch.tokens[i], order.back() + static_cast<int32_t>(i % seq_len));
      EXPECT_EQ(batch.targets[i], batch.tokens[i] + 1);
    }
    const std::set<int32_t> starts(order.begin(), order.end());
    EXPECT_EQ(starts.size(), 10u);
    EXPECT_EQ(*starts.begin(), 0);
    EXPECT_EQ(*starts.rbegin(), 9 * seq_len);
    orders.push_back(order);
  }
  EXPECT_NE(orders[0], orders[1]);
  EXPECT_NE(orders[1], orders[2]);
}

TEST(Sampler, TheLastTokenIsOnlyATarget) {
  TempDir dir;
  write_store(dir / "a.h5", 2 * seq_len);
  write_store(dir / "b.h5", seq_len);
  const TokenStore two(dir / "a.h5"), one(dir / "b.h5");
  EXPECT_EQ(Sampler(two, seq_len, 1).sequences(), 1);
  EXPECT_ERROR(Sampler(one, seq_len, 1), "8 tokens, data.seq_len 8 needs at least 9");
}

// Three ranks that each take their share of a batch see what one rank sees, wherever they start.
TEST(Sampler, DependsOnSeedAndPositionOnly) {
  TempDir dir;
  write_store(dir / "a.h5", 10 * seq_len + 1);
  const TokenStore store(dir / "a.h5");
  Sampler alone(store, seq_len, 3);
  const Batch whole = draw(alone, 6, 9);  // across the end of an epoch
  std::vector<int32_t> shares;
  for (int64_t rank = 0; rank < 3; ++rank) {
    Sampler sampler(store, seq_len, 3);
    const Batch share = draw(sampler, 6 + rank * 3, 3);
    shares.insert(shares.end(), share.tokens.begin(), share.tokens.end());
  }
  EXPECT_EQ(shares, whole.tokens);
  Sampler other(store, seq_len, 4);
  EXPECT_NE(draw(other, 6, 9).tokens, whole.tokens);
}

}  // namespace
}  // namespace entrain
