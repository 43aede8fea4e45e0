#include "core/params.h"

#include <gtest/gtest.h>

#include "tests/expect_error.h"
#include "tests/support.h"

namespace entrain {
namespace {

const std::vector<ParamSpec> specs{{"q", {2, 3}, 0.02},
                                   {"k", {1, 3}, 0.02},
                                   {"norm", {3}, 0, 1, false},
                                   {"head", {500, 40}, 0.1, 2}};

TEST(Params, WindowsLieInFlatBuffersInOrder) {
  const Params params(specs, 1, true, Device::cpu);
  EXPECT_EQ(params.numel(), 12 + 20000);
  EXPECT_EQ(params.get("norm").value.data, params.values().ptr<float>() + 9);
  EXPECT_EQ(params.get("norm").grad.data, params.grads().ptr<float>() + 9);
  EXPECT_EQ(params.get("norm").begin, 9);
  EXPECT_EQ(params.m().shape, params.values().shape);
  EXPECT_EQ(params.v().shape, params.values().shape);
  EXPECT_EQ(params.grads(1, 2).data, params.get("k").grad.data);
  EXPECT_EQ(params.grads(1, 2).shape, (Shape{6}));
  EXPECT_FALSE(params.get("norm").decay);
  EXPECT_TRUE(params.get("q").decay);
  EXPECT_ERROR(params.get("nom"), "no parameter nom");
  for (const double g : values(params.grads())) ASSERT_EQ(g, 0);
}

TEST(Params, ShardsCoverTheFlatBuffers) {
  const Params whole(specs, 1, true, Device::cpu);
  const int64_t total = whole.values().numel();
  for (const int count : {1, 2, 3, 5, 500}) {  // of 500, the last hold nothing
    int64_t end = 0;
    size_t least = whole.bytes();
    for (int index = 0; index < count; ++index) {
      const Params params(specs, 1, true, Device::cpu, DType::f32, {index, count});
      EXPECT_TRUE(same_bits(params.values(), whole.values()));
      EXPECT_EQ(params.shard_begin(index), end);
      EXPECT_EQ(params.m().shape, params.v().shape);
      const Tensor own = params.of_shard(params.grads());
      EXPECT_EQ(own.data, params.grads().ptr<float>() + end);
      EXPECT_EQ(own.shape, params.m().shape);
      if (own.numel() > 0) {
        EXPECT_EQ(params.shards().slice(0, index, 1).data, params.of_shard(params.values()).data);
      }
      end += own.numel();
      least = std::min(least, params.bytes());
    }
    EXPECT_EQ(end, total);
    // Moments are half of the memory but for a byte an element.
    EXPECT_LE(least, whole.bytes() - static_cast<size_t>(8 * (total - total / count)) +
                         static_cast<size_t>(4 * 64 * count));
  }
}

TEST(Params, PacksNeighboursIntoOneMatrix) {
  const Params params(specs, 1, true, Device::cpu);
  const Param qk = params.packed("q", 2);
  EXPECT_EQ(qk.value.shape, (Shape{3, 3}));
  EXPECT_EQ(qk.value.data, params.get("q").value.data);
  EXPECT_EQ(values(qk.value.slice(0, 2, 1)), values(params.get("k").value));
  EXPECT_EQ(qk.grad.data, params.get("q").grad.data);
}

TEST(Params, StartFromTheSeedAndTheName) {
  const Params a(specs, 1, false, Device::cpu), other(specs, 2, false, Device::cpu);
  const Params reordered({specs[3], specs[0]}, 1, false, Device::cpu);
  EXPECT_TRUE(same_bits(a.get("q").value, reordered.get("q").value));
  EXPECT_TRUE(same_bits(a.get("head").value, reordered.get("head").value));
  EXPECT_FALSE(same_bits(a.get("q").value, other.get("q").value));
  EXPECT_EQ(values(a.get("norm").value), std::vector<double>(3, 1.0));
  EXPECT_FALSE(a.grads());  // not training
  EXPECT_FALSE(a.m());

  double sum = 0, squares = 0;
  for (const double x : values(a.get("head").value)) {
    sum += x - 2;
    squares += (x - 2) * (x - 2);
  }
  EXPECT_NEAR(sum / 20000, 0, 0.004);
  EXPECT_NEAR(std::sqrt(squares / 20000), 0.1, 0.002);
}

}  // namespace
}  // namespace entrain
