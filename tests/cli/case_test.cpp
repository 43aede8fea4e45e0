// A case of `entrain op`: what is read from a file, what the host sees of it, what is written.
#include <gtest/gtest.h>

#include "cli/op.h"
#include "tests/expect_error.h"
#include "tests/kernels/gpu.h"
#include "tests/temp_dir.h"

namespace entrain::cli {
namespace {

class CaseOfAFile : public testing::TestWithParam<Device> {
 protected:
  CaseOfAFile() {
    if (GetParam() == Device::cuda && !gpu::available()) return;
    float z[] = {1.5f, -2, 0.25f, 4, 0, -1};
    h5::File file = h5::File::create(in_);
    file.write("one/in/z", Tensor::of(z, {2, 3}));
    file.set("one", "alpha", 1.5);
    file.close();
  }

  /// f64 on the CPU, f32 on the GPU.
  DType real() const { return GetParam() == Device::cuda ? DType::f32 : DType::f64; }

  TempDir dir_;
  const std::string in_ = dir_ / "in.h5", out_ = dir_ / "out.h5";
};

double get(const Tensor& t, int64_t i) {
  return t.dtype == DType::f64 ? t.ptr<double>()[i] : t.ptr<float>()[i];
}

TEST_P(CaseOfAFile, IsReadComputedOnAndWritten) {
  if (GetParam() == Device::cuda) NEEDS_GPU();
  const h5::File in = h5::File::open(in_);
  Case c(in, "one", GetParam(), real());
  const Tensor z = c.input("z", real(), 2), sum = c.result("out/sum", {2, 3});
  EXPECT_EQ(z.device, GetParam());
  EXPECT_EQ(c.parameter("alpha", 2), 1.5);
  EXPECT_EQ(get(c.host(z), 1), -2);

  with_kernels(c.device, [&](auto kernels) { kernels.add(z, z, sum); });
  EXPECT_EQ(get(c.host(sum), 1), -4) << "what was computed since it was last looked at";
  const Tensor count = c.host_result("out/count", {1}, DType::i32);
  *count.ptr<int32_t>() = 7;

  h5::File out = h5::File::create(out_);
  c.write(out);
  h5::Array written = out.read("one/out/sum");
  EXPECT_EQ(written.shape, (Shape{2, 3}));
  EXPECT_EQ(get(written.tensor(), 3), 8);
  EXPECT_EQ(*out.read("one/out/count").tensor().ptr<int32_t>(), 7);
}

TEST_P(CaseOfAFile, NamesWhatItLacks) {
  if (GetParam() == Device::cuda) NEEDS_GPU();
  const h5::File in = h5::File::open(in_);
  Case c(in, "one", GetParam(), real());
  EXPECT_ERROR(c.input("q", real(), 2), "case one has no input in/q");
  EXPECT_ERROR(c.input("z", real(), 3), "3 dimensions are needed");
  EXPECT_ERROR(c.required("chunk"), "case one has no attribute chunk");
}

INSTANTIATE_TEST_SUITE_P(Devices, CaseOfAFile, testing::Values(Device::cpu, Device::cuda),
                         [](const auto& info) {
                           return std::string(info.param == Device::cpu ? "Cpu" : "Cuda");
                         });

}  // namespace
}  // namespace entrain::cli
