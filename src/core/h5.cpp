#include "core/h5.h"

#include <fcntl.h>
#include <hdf5.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>

#include "core/error.h"

namespace entrain::h5 {
namespace {

/// An HDF5 identifier, closed at the end of its scope.
class Id {
 public:
  Id(hid_t id, herr_t (*close)(hid_t)) : id_(id), close_(close) {}
  ~Id() {
    if (id_ >= 0) close_(id_);
  }
  Id(const Id&) = delete;
  Id& operator=(const Id&) = delete;

  operator hid_t() const { return id_; }
  bool ok() const { return id_ >= 0; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

/// What HDF5 says went wrong: the system's own words where there are any, else its innermost
/// message.
std::string reason() {
  std::string text;
  const auto visit = [](unsigned, const H5E_error2_t* error, void* out) -> herr_t {
    auto& text = *static_cast<std::string*>(out);
    const std::string message = error->desc ? error->desc : "";
    const std::string mark = "error message = '";
    if (const size_t at = message.find(mark); at != std::string::npos) {
      const size_t begin = at + mark.size();
      text = message.substr(begin, message.find('\'', begin) - begin);
      return 1;  // stop
    }
    if (text.empty()) text = message;
    return 0;
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, visit, &text);
  return text.empty() ? "HDF5 gives no reason" : text;
}

/// HDF5's own clean-up at exit follows what a full disk kept it from writing into memory already
/// freed. Here it happens only when every write went well; close() has flushed all that counts.
class Library {
 public:
  Library() {
    H5dont_atexit();
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);  // errors are thrown, not printed
  }
  ~Library() {
    if (!failed) H5close();
  }
  bool failed = false;
};

Library& library() {
  static Library only;
  return only;
}

[[noreturn]] void write_failed(const std::string& path, const std::string& what) {
  library().failed = true;
  fail("{}: cannot write {}: {} (disk full?)", path, what, reason());
}

[[noreturn]] void read_failed(const std::string& path, const std::string& what) {
  fail("{}: cannot read {}: {}; the file is damaged or truncated", path, what, reason());
}

hid_t native(DType type) {
  switch (type) {
    case DType::f32:
      return H5T_NATIVE_FLOAT;
    case DType::f64:
      return H5T_NATIVE_DOUBLE;
    case DType::i32:
      return H5T_NATIVE_INT32;
    case DType::u8:
      return H5T_NATIVE_UINT8;
    case DType::u16:
      return H5T_NATIVE_UINT16;
    case DType::u32:
      return H5T_NATIVE_UINT32;
    case DType::u64:
      return H5T_NATIVE_UINT64;
    case DType::bf16:
      break;  // files hold it as f32
  }
  return H5I_INVALID_HID;
}

template <class T>
hid_t native() {
  if constexpr (std::is_same_v<T, int64_t>)
    return H5T_NATIVE_INT64;
  else
    return native(dtype_of<T>());
}

/// Object names as HDF5 takes them: "" is the root.
std::string object_name(const std::string& name) {
  return name.empty() ? "/" : name;
}

/// Every link on the way exists; H5Lexists alone fails when an earlier one is missing.
bool exists(hid_t file, const std::string& name) {
  for (size_t at = name.find_first_not_of('/'); at != std::string::npos;) {
    const size_t end = name.find('/', at);
    if (H5Lexists(file, name.substr(0, end).c_str(), H5P_DEFAULT) <= 0) return false;
    at = end == std::string::npos ? end : name.find_first_not_of('/', end);
  }
  return true;
}

Id open_dataset(hid_t file, const std::string& path, const std::string& name) {
  require(exists(file, name), "{}: no dataset {}", path, name);
  const hid_t object = H5Oopen(file, name.c_str(), H5P_DEFAULT);
  if (object < 0) read_failed(path, name);
  if (H5Iget_type(object) == H5I_DATASET) return {object, H5Oclose};
  H5Oclose(object);
  fail("{}: {} is a group, not a dataset", path, name);
}

Shape shape_of(hid_t dataset, const std::string& path, const std::string& name) {
  const Id space(H5Dget_space(dataset), H5Sclose);
  const int rank = H5Sget_simple_extent_ndims(space);
  if (rank < 0) read_failed(path, name);
  require(rank <= Shape::max_rank, "{}: {} has {} dimensions, at most {} are supported", path, name,
          rank, Shape::max_rank);
  hsize_t extent[Shape::max_rank] = {};
  H5Sget_simple_extent_dims(space, extent, nullptr);
  Shape shape;
  shape.rank = rank;
  hsize_t numel = 1;
  for (int d = 0; d < rank; ++d) {
    require(extent[d] == 0 || numel <= (uint64_t{1} << 48) / extent[d],
            "{}: {} says it has more elements than any memory holds", path, name);
    numel *= extent[d];
  }
  std::copy_n(extent, rank, shape.extent.begin());
  return shape;
}

DType nearest(hid_t dataset, const std::string& path, const std::string& name) {
  const Id type(H5Dget_type(dataset), H5Tclose);
  const size_t size = H5Tget_size(type);
  switch (H5Tget_class(type)) {
    case H5T_FLOAT:
      return size == 8 ? DType::f64 : DType::f32;
    case H5T_ENUM:
      return DType::u8;  // h5py's booleans
    case H5T_INTEGER:
      if (H5Tget_sign(type) == H5T_SGN_2) return DType::i32;
      return size == 1 ? DType::u8 : size == 2 ? DType::u16 : size == 4 ? DType::u32 : DType::u64;
    default:
      fail("{}: {} holds neither numbers nor booleans", path, name);
  }
}

Id space_of(const Shape& shape) {
  hsize_t extent[Shape::max_rank] = {};
  std::copy_n(shape.extent.begin(), shape.rank, extent);
  return {shape.rank ? H5Screate_simple(shape.rank, extent, nullptr) : H5Screate(H5S_SCALAR),
          H5Sclose};
}

/// Chunks of about a megabyte: the outer dimensions shrink first.
void chunk(hid_t creation, const Shape& shape, size_t element) {
  hsize_t extent[Shape::max_rank];
  std::copy_n(shape.extent.begin(), shape.rank, extent);
  hsize_t room = std::max<hsize_t>(1, (hsize_t{1} << 20) / element);
  for (int d = shape.rank - 1; d >= 0; --d) {
    extent[d] = std::clamp<hsize_t>(extent[d], 1, room);
    room = std::max<hsize_t>(1, room / extent[d]);
  }
  H5Pset_chunk(creation, shape.rank, extent);
}

/// Keeps the time out of an object, so that files of the same contents are the same bytes.
void without_times(hid_t creation) {
  H5Pset_obj_track_times(creation, false);
}

/// Creates the groups in `name` that end with a slash, where there are none yet.
void create_groups(hid_t file, const std::string& path, const std::string& name) {
  const Id creation(H5Pcreate(H5P_GROUP_CREATE), H5Pclose);
  without_times(creation);
  for (size_t end = name.find('/', 1); end != name.npos; end = name.find('/', end + 1)) {
    const std::string group = name.substr(0, end);
    if (exists(file, group)) continue;
    const Id created(H5Gcreate2(file, group.c_str(), H5P_DEFAULT, creation, H5P_DEFAULT), H5Gclose);
    if (!created.ok()) write_failed(path, group);
  }
}

/// Creates a dataset and the groups on the way to it.
Id create_dataset(hid_t file, const std::string& path, const std::string& name, DType dtype,
                  hid_t space, hid_t creation) {
  create_groups(file, path, name);
  without_times(creation);
  const hid_t dataset =
      H5Dcreate2(file, name.c_str(), native(dtype), space, H5P_DEFAULT, creation, H5P_DEFAULT);
  if (dataset < 0) write_failed(path, name);
  return {dataset, H5Dclose};
}

/// The memory and file spaces of elements [begin, begin + count) of a one-dimensional dataset.
struct Range {
  Range(hid_t dataset, hsize_t begin, hsize_t count)
      : memory(H5Screate_simple(1, &count, nullptr), H5Sclose),
        file(H5Dget_space(dataset), H5Sclose) {
    H5Sselect_hyperslab(file, H5S_SELECT_SET, &begin, nullptr, &count, nullptr);
  }
  Id memory, file;
};

void require_range(const Shape& shape, int64_t begin, int64_t count, const std::string& path,
                   const std::string& name) {
  require(shape.rank == 1, "{}: {} has shape {}, expected one dimension", path, name,
          shape.to_string());
  require(begin >= 0 && count >= 0 && begin <= shape[0] - count,
          "{}: elements {} to {} of {}, which has only {}", path, begin, begin + count, name,
          shape[0]);
}

void require_host(Tensor x, const std::string& path, const std::string& name) {
  require(x.device == Device::cpu && x.contiguous(), "{}: {} needs a contiguous host tensor", path,
          name);
}

Id open_attribute(hid_t file, const std::string& path, const std::string& object,
                  const std::string& name) {
  const std::string at = object_name(object);
  require(exists(file, at), "{}: no group or dataset {}", path, at);
  require(H5Aexists_by_name(file, at.c_str(), name.c_str(), H5P_DEFAULT) > 0,
          "{}: {} has no attribute {}", path, at, name);
  const hid_t attribute = H5Aopen_by_name(file, at.c_str(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT);
  if (attribute < 0) read_failed(path, at + "@" + name);
  return {attribute, H5Aclose};
}

void require_one(hid_t attribute, const std::string& path, const std::string& where) {
  const Id space(H5Aget_space(attribute), H5Sclose);
  require(H5Sget_simple_extent_npoints(space) == 1, "{}: attribute {} is not a single value", path,
          where);
}

template <class T>
T read_number(hid_t file, const std::string& path, const std::string& object,
              const std::string& name) {
  const std::string where = object_name(object) + "@" + name;
  const Id attribute = open_attribute(file, path, object, name);
  require_one(attribute, path, where);
  const Id type(H5Aget_type(attribute), H5Tclose);
  const H5T_class_t kind = H5Tget_class(type);
  require(kind == H5T_INTEGER || kind == H5T_FLOAT || kind == H5T_ENUM,
          "{}: attribute {} is not a number", path, where);
  if (std::is_integral_v<T> && kind == H5T_FLOAT) {
    double value = 0;
    if (H5Aread(attribute, H5T_NATIVE_DOUBLE, &value) < 0) read_failed(path, where);
    require(std::abs(value) < 0x1p53 && value == std::trunc(value),
            "{}: attribute {} is {}, expected an integer", path, where, value);
    return static_cast<T>(value);
  }
  T value{};
  if (H5Aread(attribute, native<T>(), &value) < 0) read_failed(path, where);
  return value;
}

void write_attribute(hid_t file, const std::string& path, const std::string& object,
                     const std::string& name, hid_t type, const void* value) {
  const std::string at = object_name(object), where = at + "@" + name;
  if (!exists(file, at)) create_groups(file, path, at + '/');
  if (H5Aexists_by_name(file, at.c_str(), name.c_str(), H5P_DEFAULT) > 0)
    H5Adelete_by_name(file, at.c_str(), name.c_str(), H5P_DEFAULT);
  const Id space(H5Screate(H5S_SCALAR), H5Sclose);
  const Id attribute(H5Acreate_by_name(file, at.c_str(), name.c_str(), type, space, H5P_DEFAULT,
                                       H5P_DEFAULT, H5P_DEFAULT),
                     H5Aclose);
  if (!attribute.ok() || H5Awrite(attribute, type, value) < 0) write_failed(path, where);
}

/// Names of the links in a group, sorted.
std::vector<std::string> links(hid_t file, const std::string& path, const std::string& group) {
  const std::string at = object_name(group);
  require(exists(file, at), "{}: no group {}", path, at);
  H5G_info_t info;
  if (H5Gget_info_by_name(file, at.c_str(), &info, H5P_DEFAULT) < 0) read_failed(path, at);
  std::vector<std::string> names;
  for (hsize_t i = 0; i < info.nlinks; ++i) {
    char name[1024];
    if (H5Lget_name_by_idx(file, at.c_str(), H5_INDEX_NAME, H5_ITER_INC, i, name, sizeof name,
                           H5P_DEFAULT) < 0)
      read_failed(path, at);
    names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

bool is_group(hid_t file, const std::string& path, const std::string& name) {
  const Id object(H5Oopen(file, name.c_str(), H5P_DEFAULT), H5Oclose);
  if (!object.ok()) read_failed(path, name);
  return H5Iget_type(object) == H5I_GROUP;
}

std::string join(const std::string& group, const std::string& name) {
  return object_name(group) == "/" ? "/" + name : group + "/" + name;
}

void collect_datasets(hid_t file, const std::string& path, const std::string& group,
                      const std::string& prefix, std::vector<std::string>& out) {
  require(std::ranges::count(group, '/') < 32, "{}: groups nest without end at {}", path, group);
  for (const std::string& name : links(file, path, group)) {
    const std::string full = join(group, name);
    if (is_group(file, path, full))
      collect_datasets(file, path, full, prefix + name + "/", out);
    else
      out.push_back(prefix + name);
  }
}

}  // namespace

struct File::Handle {
  hid_t id = H5I_INVALID_HID;
  bool writable = false;

  ~Handle() {
    if (id >= 0 && H5Fclose(id) < 0) library().failed = true;
  }
  Handle(hid_t id, bool writable) : id(id), writable(writable) {}
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
};

Tensor Array::tensor() {
  return Tensor::of(bytes.data(), shape, dtype);
}

File::File(std::string path, std::shared_ptr<Handle> handle)
    : path_(std::move(path)), handle_(std::move(handle)) {}

int64_t File::id() const {
  require(handle_ != nullptr, "{}: used after it was closed", path_);
  return handle_->id;
}

File File::open(const std::string& path) {
  library();
  struct stat status;
  if (stat(path.c_str(), &status) != 0 || ::access(path.c_str(), R_OK) != 0)
    fail("{}: {}", path, std::strerror(errno));
  require(!S_ISDIR(status.st_mode), "{}: is a folder, expected an HDF5 file", path);
  require(H5Fis_hdf5(path.c_str()) > 0, "{}: not an HDF5 file{}", path,
          status.st_size == 0 ? " (it is empty)" : "");
  const Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  const hid_t id = H5Fopen(path.c_str(), H5F_ACC_RDONLY, access);
  if (id < 0) read_failed(path, "the HDF5 header");
  return {path, std::make_shared<Handle>(id, false)};
}

File File::create(const std::string& path) {
  library();
  const Id access(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_fclose_degree(access, H5F_CLOSE_STRONG);
  // The newer layout checksums all metadata, so damage is reported instead of followed, and lets
  // attributes pass 64 KiB.
  H5Pset_libver_bounds(access, H5F_LIBVER_V110, H5F_LIBVER_LATEST);
  const Id creation(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  without_times(creation);
  const hid_t id = H5Fcreate(path.c_str(), H5F_ACC_TRUNC, creation, access);
  require(id >= 0, "{}: cannot create: {}", path, reason());
  return {path, std::make_shared<Handle>(id, true)};
}

bool File::has(const std::string& name) const {
  return exists(id(), name);
}

std::vector<std::string> File::groups(const std::string& group) const {
  std::vector<std::string> names = links(id(), path_, group);
  std::erase_if(names, [&](const auto& n) { return !is_group(id(), path_, join(group, n)); });
  return names;
}

std::vector<std::string> File::datasets(const std::string& group) const {
  std::vector<std::string> names;
  collect_datasets(id(), path_, group, "", names);
  std::sort(names.begin(), names.end());
  return names;
}

Shape File::shape(const std::string& dataset) const {
  return shape_of(open_dataset(id(), path_, dataset), path_, dataset);
}

Array File::read(const std::string& dataset) const {
  const Id from = open_dataset(id(), path_, dataset);
  Array array{shape_of(from, path_, dataset), nearest(from, path_, dataset), {}};
  array.bytes.resize(static_cast<size_t>(array.shape.numel()) * size_of(array.dtype));
  read(dataset, array.tensor());
  return array;
}

void File::read(const std::string& dataset, Tensor into) const {
  const Id from = open_dataset(id(), path_, dataset);
  nearest(from, path_, dataset);  // refuses what is not numbers
  const Shape shape = shape_of(from, path_, dataset);
  require(shape == into.shape, "{}: {} has shape {}, expected {}", path_, dataset,
          shape.to_string(), into.shape.to_string());
  require_host(into, path_, dataset);
  if (into.numel() == 0) return;
  if (H5Dread(from, native(into.dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, into.data) < 0)
    read_failed(path_, dataset);
}

Placed File::placed(const std::string& dataset) const {
  const Id from = open_dataset(id(), path_, dataset);
  Placed place{0, shape_of(from, path_, dataset), nearest(from, path_, dataset)};
  const Id type(H5Dget_type(from), H5Tclose);
  const Id creation(H5Dget_create_plist(from), H5Pclose);
  require(H5Pget_layout(creation) == H5D_CONTIGUOUS && H5Tequal(type, native(place.dtype)) > 0,
          "{}: {} is not stored as plain {} numbers in one piece", path_, dataset,
          name_of(place.dtype));
  if (place.shape.numel() == 0) return place;
  const haddr_t offset = H5Dget_offset(from);
  require(offset != HADDR_UNDEF, "{}: {} was never written", path_, dataset);
  place.offset = static_cast<int64_t>(offset);
  return place;
}

void File::write(const std::string& dataset, Tensor x, Pack pack) {
  require_host(x, path_, dataset);
  const Id space = space_of(x.shape);
  const Id creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  if (pack == Pack::gzip && x.shape.rank > 0 && x.numel() > 0) {
    chunk(creation, x.shape, size_of(x.dtype));
    H5Pset_shuffle(creation);
    H5Pset_deflate(creation, 4);
  }
  const Id to = create_dataset(id(), path_, dataset, x.dtype, space, creation);
  if (x.numel() > 0 && H5Dwrite(to, native(x.dtype), H5S_ALL, H5S_ALL, H5P_DEFAULT, x.data) < 0)
    write_failed(path_, dataset);
}

void File::reserve(const std::string& dataset, Shape shape, DType dtype) {
  const Id space = space_of(shape);
  const Id creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_alloc_time(creation, H5D_ALLOC_TIME_EARLY);
  H5Pset_fill_time(creation, H5D_FILL_TIME_NEVER);
  create_dataset(id(), path_, dataset, dtype, space, creation);
}

void File::write_range(const std::string& dataset, int64_t begin, Tensor x) {
  require_host(x, path_, dataset);
  const Id to = open_dataset(id(), path_, dataset);
  require_range(shape_of(to, path_, dataset), begin, x.numel(), path_, dataset);
  if (x.numel() == 0) return;
  const Range range(to, static_cast<hsize_t>(begin), static_cast<hsize_t>(x.numel()));
  if (H5Dwrite(to, native(x.dtype), range.memory, range.file, H5P_DEFAULT, x.data) < 0)
    write_failed(path_, dataset);
}

bool File::has_attribute(const std::string& object, const std::string& name) const {
  const std::string at = object_name(object);
  return exists(id(), at) && H5Aexists_by_name(id(), at.c_str(), name.c_str(), H5P_DEFAULT) > 0;
}

std::vector<std::string> File::attributes(const std::string& object) const {
  const std::string at = object_name(object);
  require(exists(id(), at), "{}: no group or dataset {}", path_, at);
  const Id opened(H5Oopen(id(), at.c_str(), H5P_DEFAULT), H5Oclose);
  const int count = opened.ok() ? H5Aget_num_attrs(opened) : -1;
  if (count < 0) read_failed(path_, at);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    char name[1024];
    if (H5Aget_name_by_idx(opened, ".", H5_INDEX_NAME, H5_ITER_INC, static_cast<hsize_t>(i), name,
                           sizeof name, H5P_DEFAULT) < 0)
      read_failed(path_, at);
    names.emplace_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string File::text(const std::string& object, const std::string& name) const {
  const std::string where = object_name(object) + "@" + name;
  const Id attribute = open_attribute(id(), path_, object, name);
  require_one(attribute, path_, where);
  const Id type(H5Aget_type(attribute), H5Tclose);
  require(H5Tget_class(type) == H5T_STRING, "{}: attribute {} is not text", path_, where);
  if (H5Tis_variable_str(type) > 0) {
    char* value = nullptr;
    if (H5Aread(attribute, type, &value) < 0) read_failed(path_, where);
    std::string text = value ? value : "";
    H5free_memory(value);
    return text;
  }
  std::string text(H5Tget_size(type), '\0');
  if (H5Aread(attribute, type, text.data()) < 0) read_failed(path_, where);
  const char padding = H5Tget_strpad(type) == H5T_STR_SPACEPAD ? ' ' : '\0';
  text.resize(text.find_last_not_of(padding) + 1);
  return text;
}

double File::number(const std::string& object, const std::string& name) const {
  return read_number<double>(id(), path_, object, name);
}

int64_t File::integer(const std::string& object, const std::string& name) const {
  return read_number<int64_t>(id(), path_, object, name);
}

// Text of fixed length lies within the checksummed metadata; variable length would not.
void File::set(const std::string& object, const std::string& name, const std::string& value) {
  const Id type(H5Tcopy(H5T_C_S1), H5Tclose);
  H5Tset_size(type, std::max<size_t>(1, value.size()));
  H5Tset_strpad(type, H5T_STR_NULLPAD);
  H5Tset_cset(type, H5T_CSET_UTF8);
  write_attribute(id(), path_, object, name, type, value.c_str());
}

void File::set(const std::string& object, const std::string& name, double value) {
  write_attribute(id(), path_, object, name, H5T_NATIVE_DOUBLE, &value);
}

void File::set(const std::string& object, const std::string& name, int64_t value) {
  write_attribute(id(), path_, object, name, H5T_NATIVE_INT64, &value);
}

void File::close() {
  const hid_t file = id();
  const bool writable = handle_->writable;
  const bool flushed = !writable || H5Fflush(file, H5F_SCOPE_GLOBAL) >= 0;
  const std::string why = flushed ? "" : reason();
  handle_->id = H5I_INVALID_HID;
  handle_.reset();
  const bool closed = H5Fclose(file) >= 0;
  if (!flushed || !closed) library().failed = true;
  require(flushed && closed, "{}: cannot finish writing: {} (disk full?)", path_,
          flushed ? reason() : why);
  if (!writable) return;
  const int descriptor = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC);
  const int synced = descriptor < 0 ? -1 : fsync(descriptor);
  const int error = errno;
  if (descriptor >= 0) ::close(descriptor);
  require(synced == 0, "{}: cannot finish writing: {} (disk full?)", path_, std::strerror(error));
}

}  // namespace entrain::h5
