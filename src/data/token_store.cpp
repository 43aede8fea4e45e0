#include "data/token_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <vector>

#include "core/error.h"
#include "core/h5.h"
#include "data/token_format.h"

namespace entrain {
namespace {

/// A file mapped read only.
class Map {
 public:
  explicit Map(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    require(file >= 0, "{}: {}", path, std::strerror(errno));
    struct stat status {};
    fstat(file, &status);
    size_ = static_cast<size_t>(status.st_size);
    data_ = mmap(nullptr, size_, PROT_READ, MAP_SHARED, file, 0);
    const int error = errno;
    close(file);
    require(data_ != MAP_FAILED, "{}: cannot map: {}", path, std::strerror(error));
  }
  ~Map() { munmap(data_, size_); }
  Map(const Map&) = delete;
  Map& operator=(const Map&) = delete;

  const std::byte* at(int64_t offset) const {
    return static_cast<const std::byte*>(data_) + offset;
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// A dataset within the map; elements may lie at any address.
struct Column {
  const std::byte* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::u16;
  uint32_t crc = 0;  // as the file says
};

template <class T>
T element(const std::byte* data, int64_t i) {
  T value;
  std::memcpy(&value, data + static_cast<size_t>(i) * sizeof(T), sizeof(T));
  return value;
}

/// Position i of a column of positions.
int64_t position(const Column& column, int64_t i) {
  return static_cast<int64_t>(element<uint64_t>(column.data, i));
}

/// The first element of a column of ascending positions that is not below `value`.
int64_t lower_bound(const Column& column, int64_t value) {
  int64_t begin = 0, end = column.count;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (position(column, middle) < value)
      begin = middle + 1;
    else
      end = middle;
  }
  return begin;
}

Column find(const h5::File& file, const Map& map, const std::string& name) {
  const h5::Placed place = file.placed(name);
  require(place.shape.rank == 1, "{}: {} has shape {}, expected one dimension", file.path(), name,
          place.shape.to_string());
  const size_t offset = static_cast<size_t>(place.offset);
  const size_t bytes = static_cast<size_t>(place.shape[0]) * size_of(place.dtype);
  // Touching the map beyond the file's end would end the program.
  require(offset <= map.size() && bytes <= map.size() - offset,
          "{}: truncated: {} reaches beyond the end of the file", file.path(), name);
  return {map.at(place.offset), place.shape[0], place.dtype,
          static_cast<uint32_t>(file.integer(name, "crc32"))};
}

void verify(const Column& column, const std::string& path, const std::string& name) {
  const size_t bytes = static_cast<size_t>(column.count) * size_of(column.dtype);
  require(checksum(0, column.data, bytes) == column.crc,
          "{}: damaged: the checksum of {} does not match; tokenize again or restore the file",
          path, name);
}

/// Read through HDF5, which packed it.
void verify_manifest(const h5::File& file) {
  const std::vector<std::byte> manifest = file.read("manifest").bytes;
  if (!file.has_attribute("manifest", "crc32")) return;  // of an older store
  verify({manifest.data(), std::ssize(manifest), DType::u8,
          static_cast<uint32_t>(file.integer("manifest", "crc32"))},
         file.path(), "manifest");
}

/// Each answer after the one before it, the first with a token before it to be predicted from.
void require_answers(const Column& answers, int64_t tokens, const std::string& path,
                     const std::string& name) {
  require(answers.dtype == DType::u64, "{}: {} is {}, expected u64", path, name,
          name_of(answers.dtype));
  int64_t last = 0;
  for (int64_t i = 0; i < answers.count; ++i) {
    const int64_t at = position(answers, i);
    require(at > last && at < tokens,
            "{}: damaged: number {} of {} is token {}, expected one after {} and before {}", path,
            i, name, at, last, tokens);
    last = at;
  }
}

/// Widens ids; returns the position of the first one that is not below vocab, or count.
template <class T>
int64_t widen(const std::byte* data, int64_t count, uint32_t vocab, int32_t* into) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t id = element<T>(data, i);
    largest = std::max(largest, id);
    into[i] = static_cast<int32_t>(id);
  }
  if (largest < vocab) return count;
  return std::find_if(into, into + count,
                      [&](int32_t id) { return static_cast<uint32_t>(id) >= vocab; }) -
         into;
}

}  // namespace

const char* name_of(Split split) {
  return split == Split::train ? "train" : "validation";
}

struct TokenStore::Mapped {
  explicit Mapped(const std::string& path) : path(path), file(h5::File::open(path)), map(path) {}

  std::string path;
  h5::File file;
  Map map;
  int vocab = 0;
  std::array<Column, 2> tokens, offsets, answers;
  std::string model, fingerprint;
};

TokenStore::TokenStore(const std::string& path, bool verify_contents)
    : mapped_(std::make_unique<Mapped>(path)) {
  Mapped& m = *mapped_;
  require(is_token_store(m.file),
          "{}: not a token store of this version; make one with `entrain tokenize`", path);
  const int64_t vocab = m.file.integer("", "vocab_size");
  require(vocab > 0 && vocab <= INT32_MAX, "{}: impossible vocab_size {}", path, vocab);
  m.vocab = static_cast<int>(vocab);

  const Column model = find(m.file, m.map, "tokenizer_model");
  verify(model, path, "tokenizer_model");
  m.model.assign(reinterpret_cast<const char*>(model.data), static_cast<size_t>(model.count));
  m.fingerprint = fmt::format("{}-{:08x}", vocab, model.crc);
  if (verify_contents) verify_manifest(m.file);

  for (Split split : {Split::train, Split::validation}) {
    const auto s = static_cast<size_t>(split);
    const std::string group = name_of(split);
    Column& tokens = m.tokens[s] = find(m.file, m.map, group + "/tokens");
    Column& offsets = m.offsets[s] = find(m.file, m.map, group + "/document_offsets");
    require(tokens.dtype == token_dtype(m.vocab), "{}: {}/tokens is {}, expected {} for {} ids",
            path, group, name_of(tokens.dtype), name_of(token_dtype(m.vocab)), vocab);
    require(offsets.dtype == DType::u64 && offsets.count > 0 &&
                element<uint64_t>(offsets.data, offsets.count - 1) ==
                    static_cast<uint64_t>(tokens.count),
            "{}: damaged: {}/document_offsets does not end at the {} tokens", path, group,
            tokens.count);
    m.fingerprint += fmt::format("-{}:{:08x}:{:08x}", tokens.count, tokens.crc, offsets.crc);
    const std::string marks = group + "/answers";
    if (m.file.has(marks)) {
      const Column& answers = m.answers[s] = find(m.file, m.map, marks);
      if (verify_contents) verify(answers, path, marks);
      require_answers(answers, tokens.count, path, marks);
      m.fingerprint += fmt::format(":{:08x}", answers.crc);
    }
    if (!verify_contents) continue;
    verify(tokens, path, group + "/tokens");
    verify(offsets, path, group + "/document_offsets");
    std::vector<int32_t> piece(1 << 16);
    for (int64_t at = 0; at < tokens.count; at += std::ssize(piece))
      read(split, at, std::min<int64_t>(std::ssize(piece), tokens.count - at), piece.data());
  }
}

TokenStore::~TokenStore() = default;

const std::string& TokenStore::path() const {
  return mapped_->path;
}
int TokenStore::vocab() const {
  return mapped_->vocab;
}
std::string TokenStore::tokenizer() const {
  return mapped_->file.text("", "tokenizer");
}
std::string TokenStore::tokenizer_model() const {
  return mapped_->model;
}
std::string TokenStore::provenance() const {
  return mapped_->file.text("", "provenance");
}
std::string TokenStore::fingerprint() const {
  return mapped_->fingerprint;
}

int64_t TokenStore::tokens(Split split) const {
  return mapped_->tokens[static_cast<size_t>(split)].count;
}

int64_t TokenStore::documents(Split split) const {
  return mapped_->offsets[static_cast<size_t>(split)].count - 1;
}

int64_t TokenStore::answers(Split split) const {
  return mapped_->answers[static_cast<size_t>(split)].count;
}

std::vector<int64_t> TokenStore::answers(Split split, int64_t begin, int64_t count) const {
  const Column& answers = mapped_->answers[static_cast<size_t>(split)];
  std::vector<int64_t> found;
  const int64_t end = lower_bound(answers, begin + count);
  for (int64_t i = lower_bound(answers, begin); i < end; ++i) found.push_back(position(answers, i));
  return found;
}

void TokenStore::read(Split split, int64_t begin, int64_t count, int32_t* into) const {
  const Column& tokens = mapped_->tokens[static_cast<size_t>(split)];
  require(begin >= 0 && count >= 0 && begin <= tokens.count - count,
          "{}: tokens {} to {} of {}, which has only {}", path(), begin, begin + count,
          name_of(split), tokens.count);
  const std::byte* data = tokens.data + static_cast<size_t>(begin) * size_of(tokens.dtype);
  const auto vocab = static_cast<uint32_t>(mapped_->vocab);
  const int64_t good = tokens.dtype == DType::u16 ? widen<uint16_t>(data, count, vocab, into)
                                                  : widen<uint32_t>(data, count, vocab, into);
  if (good < count)
    fail("{}: damaged: token {} of {} is {}, beyond the vocabulary of {}", path(), begin + good,
         name_of(split), static_cast<uint32_t>(into[good]), vocab);
}

}  // namespace entrain
