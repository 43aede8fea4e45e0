#include "core/h5.h"

#include <gtest/gtest.h>
#include <hdf5.h>
#include <sys/resource.h>

#include <chrono>
#include <csignal>
#include <numeric>
#include <thread>

#include "tests/expect_error.h"
#include "tests/temp_dir.h"

// HDF5 loses some memory whenever it refuses a damaged file; the leak sanitizer asks for this list.
extern "C" const char* __lsan_default_suppressions();
extern "C" const char* __lsan_default_suppressions() {
  return "leak:libhdf5\n";
}

namespace entrain {
namespace {

template <class T>
std::vector<T> elements(const h5::File& file, const std::string& dataset) {
  h5::Array array = file.read(dataset);
  const T* begin = array.tensor().ptr<T>();
  return {begin, begin + array.shape.numel()};
}

TEST(H5, ReadsBackWhatItWrote) {
  TempDir dir;
  const std::string path = dir / "a.h5";
  std::vector<float> x(24);
  std::iota(x.begin(), x.end(), 0.5f);
  std::vector<uint64_t> u = {1, uint64_t{1} << 40};
  {
    h5::File file = h5::File::create(path);
    file.write("in/deep/x", Tensor::of(x.data(), {2, 3, 4}));
    file.write("packed", Tensor::of(x.data(), {24}), h5::Pack::gzip);
    file.write("u", Tensor::of(u.data(), {2}, DType::u64));
    file.write("scalar", Tensor::of(x.data(), {}));
    file.write("empty", Tensor::of(x.data(), {0, 3}), h5::Pack::gzip);
    file.close();
  }
  const h5::File file = h5::File::open(path);
  EXPECT_EQ(file.groups(), std::vector<std::string>{"in"});
  EXPECT_EQ(file.datasets(),
            (std::vector<std::string>{"empty", "in/deep/x", "packed", "scalar", "u"}));
  EXPECT_EQ(file.datasets("in"), std::vector<std::string>{"deep/x"});
  EXPECT_TRUE(file.has("in/deep"));
  EXPECT_FALSE(file.has("in/shallow/x"));
  EXPECT_EQ(file.shape("empty"), (Shape{0, 3}));

  h5::Array a = file.read("in/deep/x");
  EXPECT_EQ(a.shape, (Shape{2, 3, 4}));
  EXPECT_EQ(a.dtype, DType::f32);
  EXPECT_EQ(elements<float>(file, "in/deep/x"), x);
  EXPECT_EQ(elements<float>(file, "packed"), x);
  EXPECT_EQ(elements<uint64_t>(file, "u"), u);
  EXPECT_EQ(file.read("scalar").tensor().ptr<float>()[0], 0.5f);
  EXPECT_TRUE(file.read("empty").bytes.empty());
  std::vector<double> wide(24);
  file.read("in/deep/x", Tensor::of(wide.data(), {2, 3, 4}, DType::f64));
  EXPECT_EQ(wide[5], 5.5);
}

TEST(H5, FillsReservedSpace) {
  TempDir dir;
  const std::string path = dir / "a.h5";
  std::vector<uint16_t> x = {1, 2, 3, 4, 5};
  {
    h5::File file = h5::File::create(path);
    file.write("packed", Tensor::of(x.data(), {5}, DType::u16), h5::Pack::gzip);
    file.reserve("flat", {5}, DType::u16);
    file.write_range("flat", 2, Tensor::of(x.data() + 2, {3}, DType::u16));
    file.write_range("flat", 0, Tensor::of(x.data(), {2}, DType::u16));
    EXPECT_ERROR(file.write_range("flat", 3, Tensor::of(x.data(), {3}, DType::u16)), "only 5");
    file.close();
  }
  const h5::File file = h5::File::open(path);
  EXPECT_EQ(elements<uint16_t>(file, "flat"), x);
  const h5::Placed place = file.placed("flat");
  EXPECT_EQ(place.dtype, DType::u16);
  const std::string bytes = read_file(path);
  EXPECT_EQ(bytes.compare(static_cast<size_t>(place.offset), 10,
                          std::string(reinterpret_cast<const char*>(x.data()), 10)),
            0);
  EXPECT_ERROR(file.placed("packed"), "in one piece");
}

TEST(H5, KeepsAttributes) {
  TempDir dir;
  const std::string path = dir / "a.h5", large(200000, 'x');
  {
    h5::File file = h5::File::create(path);
    file.set("", "text", "first");
    file.set("/", "text", "größer");
    file.set("", "none", "");
    file.set("", "large", large);
    file.set("made/here", "pi", 3.25);
    file.set("made/here", "n", int64_t{-7});
    file.close();
  }
  const h5::File file = h5::File::open(path);
  EXPECT_EQ(file.text("", "text"), "größer");
  EXPECT_EQ(file.text("", "none"), "");
  EXPECT_EQ(file.text("", "large"), large);
  EXPECT_EQ(file.number("made/here", "pi"), 3.25);
  EXPECT_EQ(file.integer("made/here", "n"), -7);
  EXPECT_EQ(file.number("made/here", "n"), -7);
  EXPECT_EQ(file.attributes("made/here"), (std::vector<std::string>{"n", "pi"}));
  EXPECT_TRUE(file.has_attribute("/", "none"));
  EXPECT_FALSE(file.has_attribute("absent", "none"));
  EXPECT_ERROR(file.text("", "absent"), "no attribute absent");
  EXPECT_ERROR(file.text("made/here", "pi"), "not text");
  EXPECT_ERROR(file.number("", "text"), "not a number");
  EXPECT_ERROR(file.integer("made/here", "pi"), "expected an integer");
}

// What h5py writes: int64, float16, booleans as an enumeration of int8, text of variable length.
TEST(H5, ReadsForeignTypes) {
  TempDir dir;
  const std::string path = dir / "a.h5";
  const hid_t file = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, H5P_DEFAULT, H5P_DEFAULT);
  const hsize_t n = 3;
  const hid_t space = H5Screate_simple(1, &n, nullptr), one = H5Screate(H5S_SCALAR);
  const int64_t numbers[] = {-1, 2, 3};
  hid_t set = H5Dcreate2(file, "i64", H5T_STD_I64BE, space, 0, 0, 0);
  H5Dwrite(set, H5T_NATIVE_INT64, H5S_ALL, H5S_ALL, H5P_DEFAULT, numbers);
  H5Dclose(set);
  const hid_t boolean = H5Tenum_create(H5T_STD_I8LE);
  const int8_t no = 0, yes = 1, flags[] = {1, 0, 1};
  H5Tenum_insert(boolean, "FALSE", &no), H5Tenum_insert(boolean, "TRUE", &yes);
  set = H5Dcreate2(file, "bool", boolean, space, 0, 0, 0);
  H5Dwrite(set, boolean, H5S_ALL, H5S_ALL, H5P_DEFAULT, flags);
  hid_t attribute = H5Acreate2(set, "flag", boolean, one, 0, 0);
  H5Awrite(attribute, boolean, &yes);
  H5Aclose(attribute);
  const hid_t text = H5Tcopy(H5T_C_S1);
  H5Tset_size(text, H5T_VARIABLE);
  attribute = H5Acreate2(set, "text", text, one, 0, 0);
  const char* value = "dash";
  H5Awrite(attribute, text, &value);
  H5Aclose(attribute), H5Dclose(set);
  H5Tclose(text), H5Tclose(boolean), H5Sclose(space), H5Sclose(one), H5Fclose(file);

  const h5::File read = h5::File::open(path);
  h5::Array a = read.read("i64");
  EXPECT_EQ(a.dtype, DType::i32);
  EXPECT_EQ(a.tensor().ptr<int32_t>()[0], -1);
  h5::Array b = read.read("bool");
  EXPECT_EQ(b.dtype, DType::u8);
  EXPECT_EQ(b.bytes, (std::vector<std::byte>{std::byte{1}, std::byte{0}, std::byte{1}}));
  EXPECT_EQ(read.text("bool", "text"), "dash");
  EXPECT_EQ(read.integer("bool", "flag"), 1);
}

TEST(H5, NamesFileAndObjectInErrors) {
  TempDir dir;
  const std::string path = dir / "a.h5";
  std::vector<float> x(100000, 1.0f);
  {
    h5::File file = h5::File::create(path);
    file.write("group/x", Tensor::of(x.data(), {100000}));
    file.close();
    EXPECT_ERROR(file.has("group"), "closed");
  }
  EXPECT_ERROR(h5::File::open(path).read("y"), path + ": no dataset y");
  EXPECT_ERROR(h5::File::open(path).read("group"), "group is a group");
  EXPECT_ERROR(h5::File::open(path).read("group/x", Tensor::of(x.data(), {10})),
               "shape [100000], expected [10]");
  EXPECT_ERROR(h5::File::open(dir / "absent"), "No such file");
  EXPECT_ERROR(h5::File::open(dir / ""), "folder");
  EXPECT_ERROR(h5::File::create(dir / "no/such/folder.h5"), "No such file");
  write_file(dir / "garbage", std::string(5000, 'g'));
  EXPECT_ERROR(h5::File::open(dir / "garbage"), "not an HDF5 file");
  write_file(dir / "empty", "");
  EXPECT_ERROR(h5::File::open(dir / "empty"), "empty");
  std::filesystem::resize_file(path, 3000);
  EXPECT_ERROR(h5::File::open(path), "truncated");
}

TEST(H5, DamagedMetadataIsAnError) {
  TempDir dir;
  std::vector<float> x(64, 1.0f);
  {
    h5::File file = h5::File::create(dir / "a.h5");
    file.write("x", Tensor::of(x.data(), {64}));
    file.set("", "text", "a text of some length");
    file.close();
  }
  const std::string whole = read_file(dir / "a.h5");
  const size_t data = static_cast<size_t>(h5::File::open(dir / "a.h5").placed("x").offset);
  for (size_t at = 0; at < whole.size(); at += 3) {
    std::string damaged = whole;
    damaged[at] = static_cast<char>(damaged[at] ^ (1 << at % 8));
    write_file(dir / "b.h5", damaged);
    const std::string message = error_of([&] {
      const h5::File file = h5::File::open(dir / "b.h5");
      EXPECT_EQ(file.text("", "text"), "a text of some length") << "byte " << at;
      h5::Array a = file.read("x");
      if (at < data || at >= data + 256) {
        for (int i = 0; i < 64; ++i) EXPECT_EQ(a.tensor().ptr<float>()[i], 1.0f) << "byte " << at;
      }
    });
    EXPECT_EQ(message.find('\n'), std::string::npos);
  }
}

TEST(H5, FullDiskIsAnError) {
  TempDir dir;
  // A limit on file size stands in for a full disk; the signal it sends must not kill the test.
  rlimit before;
  getrlimit(RLIMIT_FSIZE, &before);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  const rlimit small{16384, before.rlim_max};
  setrlimit(RLIMIT_FSIZE, &small);
  std::vector<float> x(100000, 1.0f);
  EXPECT_ERROR(
      {
        h5::File file = h5::File::create(dir / "a.h5");
        file.write("x", Tensor::of(x.data(), {100000}));
        file.close();
      },
      "disk full?");
  // Small writes are buffered: only closing finds out.
  h5::File file = h5::File::create(dir / "b.h5");
  EXPECT_ERROR(
      {
        for (int i = 0; i < 200; ++i)
          file.write(fmt::format("x{}", i), Tensor::of(x.data(), {16}), h5::Pack::gzip);
        file.close();
      },
      "File too large (disk full?)");
  setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
  // The library still works afterwards.
  h5::File after = h5::File::create(dir / "b.h5");
  after.write("x", Tensor::of(x.data(), {100000}));
  after.close();
  EXPECT_EQ(elements<float>(h5::File::open(dir / "b.h5"), "x"), x);
}

TEST(H5, FilesOfTheSameContentsAreTheSameBytes) {
  TempDir dir;
  const auto write = [&](const std::string& name) {
    h5::File file = h5::File::create(dir / name);
    float values[] = {1, 2, 3};
    file.write("a/b/values", Tensor::of(values, {3}));
    file.set("c/d", "number", int64_t{7});
    file.close();
  };
  write("one.h5");
  std::this_thread::sleep_for(std::chrono::milliseconds(1100));  // HDF5's times are in seconds
  write("other.h5");
  EXPECT_EQ(read_file(dir / "one.h5"), read_file(dir / "other.h5"));
}

}  // namespace
}  // namespace entrain
