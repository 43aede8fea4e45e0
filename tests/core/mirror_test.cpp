#include "core/mirror.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

#include "core/arena.h"
#include "tests/expect_error.h"
#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

TEST(Mirror, OfTheHostIsTheTensorItself) {
  const Buffer memory(6 * sizeof(float), Device::cpu);
  const Tensor tensor = Tensor::of(memory.data(), {2, 3});
  Mirror mirror(tensor);
  EXPECT_EQ(mirror.host().data, tensor.data);
  EXPECT_EQ(mirror.host().shape, tensor.shape);
  mirror.host().ptr<float>()[5] = 7;
  mirror.upload();
  EXPECT_EQ(tensor.ptr<float>()[5], 7);
  tensor.ptr<float>()[0] = 3;
  mirror.download();
  EXPECT_EQ(mirror.host().ptr<float>()[0], 3);
}

TEST(Mirror, OfTheHostMayHaveAnyStrides) {
  const Buffer memory(6 * sizeof(float), Device::cpu);
  const Tensor turned = Tensor::of(memory.data(), {2, 3}).transpose(0, 1);
  EXPECT_EQ(Mirror(turned).host().stride, turned.stride);
}

TEST(Mirror, OfNothingIsNothing) {
  Mirror mirror;
  mirror.upload();
  mirror.download();
  EXPECT_FALSE(mirror.host());
}

TEST(Mirror, MovesItsMemory) {
  const Buffer memory(sizeof(float), Device::cpu);
  Mirror from(Tensor::of(memory.data(), {1}));
  Mirror to;
  to = std::move(from);
  EXPECT_EQ(to.host().data, memory.data());
  EXPECT_EQ(Mirror(std::move(to)).host().data, memory.data());
}

TEST(Mirror, OfTheGpuHoldsWhatTheGpuHolds) {
  NEEDS_GPU();
  const Buffer memory(3 * sizeof(double), Device::cuda);
  const Tensor tensor = Tensor::of(memory.data(), {3}, DType::f64, Device::cuda);
  Mirror one(tensor), other(tensor);
  for (int i = 0; i < 3; ++i) one.host().ptr<double>()[i] = 0.1 * i;
  one.upload();
  other.download();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(other.host().ptr<double>()[i], 0.1 * i);
}

TEST(Mirror, OfBf16RoundsToNearestEven) {
  NEEDS_GPU();
  const float ulp = 1.0f / 128;  // of bf16 at 1
  const std::vector<std::pair<float, float>> rounded = {{1 + ulp / 2, 1},
                                                        {1 + 3 * ulp / 2, 1 + 2 * ulp},
                                                        {1 + 0.51f * ulp, 1 + ulp},
                                                        {-INFINITY, -INFINITY},
                                                        {-0.0f, -0.0f},
                                                        {NAN, NAN}};
  const auto count = static_cast<int64_t>(rounded.size());
  const Buffer memory(rounded.size() * size_of(DType::bf16), Device::cuda);
  Mirror mirror(Tensor::of(memory.data(), {count}, DType::bf16, Device::cuda));
  ASSERT_EQ(mirror.host().dtype, DType::f32);
  float* host = mirror.host().ptr<float>();
  for (size_t i = 0; i < rounded.size(); ++i) host[i] = rounded[i].first;
  mirror.upload();
  mirror.download();
  for (size_t i = 0; i < rounded.size(); ++i) {
    const auto& [from, to] = rounded[i];
    if (std::isnan(to)) {
      EXPECT_TRUE(std::isnan(host[i]));
    } else {
      EXPECT_EQ(host[i], to) << from;
      EXPECT_EQ(std::signbit(host[i]), std::signbit(to)) << from;
    }
  }
}

TEST(Mirror, OfTheGpuMustBeContiguous) {
  NEEDS_GPU();
  const Buffer memory(6 * sizeof(float), Device::cuda);
  const Tensor tensor = Tensor::of(memory.data(), {2, 3}, DType::f32, Device::cuda);
  EXPECT_ERROR(Mirror(tensor.transpose(0, 1)), "contiguous");
}

TEST(Pinned, StartsAsZeros) {
  const Pinned pinned({2, 3}, DType::f64);
  EXPECT_EQ(pinned.host().shape, (Shape{2, 3}));
  for (int i = 0; i < 6; ++i) EXPECT_EQ(pinned.host().ptr<double>()[i], 0);
}

}  // namespace
}  // namespace entrain
