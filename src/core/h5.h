#pragma once
// HDF5, as little of it as the project needs: named datasets and attributes, with errors that name
// the file and the object.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace entrain::h5 {

/// A tensor read whole into host memory.
struct Array {
  Shape shape;
  DType dtype = DType::f32;
  std::vector<std::byte> bytes;

  Tensor tensor();  // a view of bytes
};

/// Where the elements of a dataset lie in its file, for mapping them.
struct Placed {
  int64_t offset = 0;  // bytes from the start of the file; 0 when there are no elements
  Shape shape;
  DType dtype = DType::f32;
};

/// Compression of a dataset: none for what is mapped or rewritten often, gzip for what is kept.
enum class Pack : uint8_t { none, gzip };

/// An open file. Paths are "group/sub/name"; groups on the way are made when writing. Every
/// member throws Error naming the file and the path: missing, of another type or shape, truncated.
class File {
 public:
  static File open(const std::string& path);    // read only
  static File create(const std::string& path);  // replaces what is there

  const std::string& path() const { return path_; }
  bool has(const std::string& name) const;
  std::vector<std::string> groups(const std::string& group = "/") const;    // sorted
  std::vector<std::string> datasets(const std::string& group = "/") const;  // sorted, recursive,
                                                                            // paths below group
  Shape shape(const std::string& dataset) const;

  /// Reads a whole dataset, converted by HDF5 to the nearest DType (float32 for floats of any
  /// size but float64, int32 for signed integers, u8 to u64 for unsigned, u8 for booleans).
  Array read(const std::string& dataset) const;
  /// Reads a whole dataset into a contiguous host tensor of the same shape, converting.
  void read(const std::string& dataset, Tensor into) const;

  /// Throws unless the dataset is stored uncompressed, in one piece and in this machine's types.
  Placed placed(const std::string& dataset) const;

  void write(const std::string& dataset, Tensor contiguous, Pack pack = Pack::none);
  /// A dataset in one piece whose elements are then written in parts with write_range.
  void reserve(const std::string& dataset, Shape shape, DType dtype);
  /// Elements [begin, begin + size) of a one-dimensional dataset.
  void write_range(const std::string& dataset, int64_t begin, Tensor one_dimensional);

  /// Attributes of a group or dataset; "" or "/" is the root. Setting one replaces its value and
  /// makes a group where there is no object yet.
  bool has_attribute(const std::string& object, const std::string& name) const;
  std::vector<std::string> attributes(const std::string& object) const;
  std::string text(const std::string& object, const std::string& name) const;
  double number(const std::string& object, const std::string& name) const;
  int64_t integer(const std::string& object, const std::string& name) const;
  void set(const std::string& object, const std::string& name, const std::string& value);
  void set(const std::string& object, const std::string& name, double value);
  void set(const std::string& object, const std::string& name, int64_t value);

  /// Flushes to the disk (fsync) and closes; throws when the disk is full. Without it the
  /// destructor closes silently: what was written then counts for nothing.
  void close();

 private:
  struct Handle;
  File(std::string path, std::shared_ptr<Handle> handle);
  int64_t id() const;  // HDF5's
  std::string path_;
  std::shared_ptr<Handle> handle_;
};

}  // namespace entrain::h5
