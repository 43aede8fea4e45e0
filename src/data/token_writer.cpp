#include "data/token_writer.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <utility>
#include <vector>

#include "core/error.h"
#include "core/file.h"
#include "core/h5.h"
#include "data/token_format.h"

namespace entrain {

/// Numbers of one type, kept in a file without a name, so that nothing is left behind.
class TokenWriter::Spool {
 public:
  Spool(const std::string& beside, DType dtype) : beside_(beside), dtype_(dtype) {
    std::string name = beside + ".XXXXXX";
    file_ = mkstemp(name.data());
    require(file_ >= 0, "{}: cannot write beside it: {}", beside, std::strerror(errno));
    unlink(name.c_str());
  }
  ~Spool() { close(file_); }
  Spool(const Spool&) = delete;
  Spool& operator=(const Spool&) = delete;

  template <class T>
  void add(T value) {
    const auto* bytes = reinterpret_cast<const std::byte*>(&value);
    buffer_.insert(buffer_.end(), bytes, bytes + sizeof value);
    ++count_;
    if (buffer_.size() >= piece_bytes) flush();
  }

  int64_t count() const { return count_; }

  /// Copies everything into a new dataset with its checksum.
  void copy_to(h5::File& out, const std::string& dataset) {
    flush();
    out.reserve(dataset, {count_}, dtype_);
    uint32_t crc = 0;
    const auto piece = static_cast<int64_t>(piece_bytes / size_of(dtype_));
    buffer_.resize(piece_bytes);
    for (int64_t at = 0; at < count_; at += piece) {
      const int64_t n = std::min(piece, count_ - at);
      const size_t bytes = static_cast<size_t>(n) * size_of(dtype_);
      read(static_cast<size_t>(at) * size_of(dtype_), bytes);
      crc = checksum(crc, buffer_.data(), bytes);
      out.write_range(dataset, at, Tensor::of(buffer_.data(), {n}, dtype_));
    }
    out.set(dataset, "crc32", int64_t{crc});
  }

 private:
  static constexpr size_t piece_bytes = size_t{4} << 20;

  void flush() {
    for (size_t done = 0; done < buffer_.size();) {
      const ssize_t n = ::write(file_, buffer_.data() + done, buffer_.size() - done);
      require(n >= 0, "{}: cannot write beside it: {} (disk full?)", beside_, std::strerror(errno));
      done += static_cast<size_t>(n);
    }
    buffer_.clear();
  }

  void read(size_t begin, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      const ssize_t n =
          pread(file_, buffer_.data() + done, bytes - done, static_cast<off_t>(begin + done));
      require(n > 0, "{}: cannot read back its temporary file: {}", beside_, std::strerror(errno));
      done += static_cast<size_t>(n);
    }
  }

  std::string beside_;
  DType dtype_;
  int file_ = -1;
  int64_t count_ = 0;
  std::vector<std::byte> buffer_;
};

struct TokenWriter::SplitSpools {
  Spool tokens, offsets, answers;
};

namespace {

std::string partial(const std::string& path) {
  return path + ".partial";
}

void write_bytes(h5::File& out, const std::string& dataset, std::string bytes, h5::Pack pack) {
  out.write(dataset, Tensor::of(bytes.data(), {std::ssize(bytes)}, DType::u8), pack);
  out.set(dataset, "crc32", int64_t{checksum(0, bytes.data(), bytes.size())});
}

bool holds_token_store(const std::string& path) {
  try {
    return is_token_store(h5::File::open(path));
  } catch (const Error&) {  // not even HDF5
    return false;
  }
}

}  // namespace

TokenWriter::TokenWriter(const std::string& path, int vocab) : path_(path), vocab_(vocab) {
  require_replaceable(path);
  require(!std::filesystem::exists(path) || holds_token_store(path),
          "{}: exists and is no token store; choose another --out, or remove it", path);
  for (auto& split : splits_)
    split.reset(
        new SplitSpools{{path, token_dtype(vocab)}, {path, DType::u64}, {path, DType::u64}});
}

TokenWriter::~TokenWriter() {
  std::error_code ignored;
  std::filesystem::remove(partial(path_), ignored);
}

void TokenWriter::add(Split split, std::span<const int32_t> ids,
                      std::span<const int64_t> document_answers) {
  auto& [tokens, offsets, answers] = *splits_[static_cast<size_t>(split)];
  for (int64_t at : document_answers) answers.add(static_cast<uint64_t>(tokens.count() + at));
  offsets.add(static_cast<uint64_t>(tokens.count()));
  for (int32_t id : ids) {
    require(id >= 0 && id < vocab_, "token id {} is beyond the vocabulary of {}", id, vocab_);
    if (token_dtype(vocab_) == DType::u16)
      tokens.add(static_cast<uint16_t>(id));
    else
      tokens.add(static_cast<uint32_t>(id));
  }
}

void TokenWriter::finish(const Description& description) {
  h5::File out = h5::File::create(partial(path_));
  out.set("", "format", token_store_format);
  out.set("", "vocab_size", int64_t{vocab_});
  out.set("", "tokenizer", description.tokenizer);
  out.set("", "provenance", description.provenance);
  write_bytes(out, "tokenizer_model", description.tokenizer_model, h5::Pack::none);
  write_bytes(out, "manifest", description.manifest, h5::Pack::gzip);
  for (Split split : {Split::train, Split::validation}) {
    auto& [tokens, offsets, answers] = *splits_[static_cast<size_t>(split)];
    offsets.add(static_cast<uint64_t>(tokens.count()));
    tokens.copy_to(out, fmt::format("{}/tokens", name_of(split)));
    offsets.copy_to(out, fmt::format("{}/document_offsets", name_of(split)));
    if (answers.count() > 0) answers.copy_to(out, fmt::format("{}/answers", name_of(split)));
  }
  out.close();
  std::error_code error;
  std::filesystem::rename(partial(path_), path_, error);
  require(!error, "{}: cannot give the finished file its name: {}", path_, error.message());
  sync_folder(path_);
}

}  // namespace entrain
