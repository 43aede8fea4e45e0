#include "core/tensor.h"

#include <gtest/gtest.h>

#include "tests/expect_error.h"
#include "tests/support.h"

namespace entrain {
namespace {

// 0, 1, 2, ... in order of memory.
Tensor counting(Pool& pool, Shape shape) {
  const Tensor t = pool.make(shape, DType::f32);
  for (int64_t i = 0; i < t.numel(); ++i) put(t, i, static_cast<double>(i));
  return t;
}

TEST(Tensor, SlicesOneDimension) {
  Pool pool;
  const Tensor t = counting(pool, {3, 4});
  EXPECT_EQ(values(t.slice(0, 1, 2)), (std::vector<double>{4, 5, 6, 7, 8, 9, 10, 11}));
  EXPECT_EQ(values(t.slice(1, 1, 2)), (std::vector<double>{1, 2, 5, 6, 9, 10}));
  EXPECT_EQ(t.slice(1, 4, 0).numel(), 0);
  EXPECT_TRUE(t.slice(0, 1, 2).contiguous());
  EXPECT_FALSE(t.slice(1, 1, 2).contiguous());
  EXPECT_ERROR(t.slice(1, 3, 2), "slice [3, 5) leaves dimension 1 of [3, 4]");
  EXPECT_ERROR(t.slice(0, -1, 2), "slice");
  EXPECT_ERROR(t.slice(0, 0, -1), "slice");
  EXPECT_ERROR(t.slice(2, 0, 1), "dimension 2 of [3, 4]");
}

TEST(Tensor, SplitsAndTransposesIntoHeads) {
  Pool pool;
  const Tensor t = counting(pool, {2, 6});
  const Tensor split = t.split(1, 3);
  EXPECT_EQ(split.shape, (Shape{2, 2, 3}));
  EXPECT_EQ(values(split), values(t));
  const Tensor heads = split.transpose(0, 1);
  EXPECT_EQ(heads.shape, (Shape{2, 2, 3}));
  EXPECT_EQ(values(heads), (std::vector<double>{0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11}));
  EXPECT_EQ(t.slice(1, 3, 3).split(1, 1).shape, (Shape{2, 3, 1}));
  EXPECT_ERROR(t.split(1, 4), "cannot split dimension 1 of [2, 6] by 4");
  EXPECT_ERROR(t.split(1, 0), "cannot split");
  EXPECT_ERROR(t.split(2, 1), "cannot split");
  EXPECT_ERROR(counting(pool, {1, 1, 1, 1}).split(0, 1), "cannot split");
  EXPECT_ERROR(t.transpose(0, 2), "cannot transpose dimensions 0 and 2 of [2, 6]");
}

TEST(Tensor, ViewsContiguousElementsOnly) {
  Pool pool;
  const Tensor t = counting(pool, {2, 6});
  EXPECT_EQ(t.view({3, 4}).stride[0], 4);
  EXPECT_EQ(t.view({12}).data, t.data);
  EXPECT_ERROR(t.view({5}), "cannot view [2, 6] as [5]");
  EXPECT_ERROR(t.slice(1, 0, 3).view({6}), "cannot view");
  EXPECT_ERROR(t.transpose(0, 1).view({12}), "cannot view");
  EXPECT_TRUE(counting(pool, {3, 1}).transpose(0, 1).contiguous());
}

TEST(Tensor, RefusesAnotherTypeAndTooManyDimensions) {
  Pool pool;
  const Tensor t = counting(pool, {2});
  EXPECT_ERROR(t.ptr<double>(), "tensor of f32 read as f64");
  EXPECT_ERROR(Shape({1, 2, 3, 4, 5}), "at most 4 dimensions");
  EXPECT_FALSE(Tensor{});
  EXPECT_EQ(t.bytes(), 8);
  EXPECT_EQ(Shape({2, 80, 64}).to_string(), "[2, 80, 64]");
}

}  // namespace
}  // namespace entrain
