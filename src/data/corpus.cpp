#include "data/corpus.h"

#include <fcntl.h>
#include <glob.h>
#include <unistd.h>
#include <zlib.h>

#include <algorithm>
#include <cctype>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string_view>

#include "core/error.h"
#include "data/tokenizer.h"

namespace entrain {
namespace {

namespace fs = std::filesystem;

constexpr size_t document_bytes = size_t{1} << 20;
constexpr size_t binary_probe = 8192;

bool exists(const std::string& path) {
  std::error_code error;
  return fs::exists(path, error);
}

std::vector<std::string> expand(const std::string& pattern) {
  glob_t found;
  std::vector<std::string> paths;
  if (glob(pattern.c_str(), 0, nullptr, &found) == 0)
    paths.assign(found.gl_pathv, found.gl_pathv + found.gl_pathc);
  globfree(&found);
  return paths;
}

/// Copies standard input to a file without a name.
int keep_standard_input() {
  std::string name = (fs::temp_directory_path() / "entrain.XXXXXX").string();
  const int copy = mkstemp(name.data());
  require(copy >= 0, "{}: cannot keep standard input there: {}", name, std::strerror(errno));
  unlink(name.c_str());
  std::vector<char> buffer(size_t{1} << 20);
  while (const ssize_t n = read(STDIN_FILENO, buffer.data(), buffer.size())) {
    require(n > 0, "standard input: {}", std::strerror(errno));
    const ssize_t kept = write(copy, buffer.data(), static_cast<size_t>(n));
    require(kept == n, "{}: cannot keep standard input there: {} (TMPDIR names another folder)",
            name, kept < 0 ? std::strerror(errno) : "disk full?");
  }
  return copy;
}

// JSON is UTF-8 and its parser refuses other bytes. to_ascii() hides them, raw and inside strings,
// as three characters that every parser passes on: DEL and the two halves of the byte. A DEL of the
// text, written as such or \u007f, becomes two, so that to_bytes() can tell what the parser read.
// Half a surrogate pair, which is no character but which other writers let through, becomes U+FFFD.
constexpr char mark = '\x7f';
constexpr std::string_view first_half = "89abAB", second_half = "cdefCDEF";

/// Whether text starts with the escape of a half of a pair; digits: what that half has after \ud.
bool escapes_half(std::string_view text, std::string_view digits) {
  const auto hex = [](char c) { return std::isxdigit(static_cast<unsigned char>(c)) != 0; };
  return text.size() >= 6 && (text.starts_with("\\ud") || text.starts_with("\\uD")) &&
         digits.find(text[3]) != digits.npos && hex(text[4]) && hex(text[5]);
}

std::string to_ascii(std::string_view line) {
  std::string out;
  for (size_t i = 0; i < line.size(); ++i) {
    const auto byte = static_cast<uint8_t>(line[i]);
    const std::string_view escape = line.substr(i, line[i] == '\\' ? 6 : 0);
    if (byte >= 0x80) {
      out += {mark, static_cast<char>('a' + byte / 16), static_cast<char>('a' + byte % 16)};
    } else if (escape == "\\u007f" || escape == "\\u007F") {
      out += {mark, mark};
      i += 5;
    } else if (const bool first = escapes_half(escape, first_half);
               first || escapes_half(escape, second_half)) {
      const bool pair = first && escapes_half(line.substr(i + 6), second_half);
      out += pair ? line.substr(i, 12) : "\\ufffd";
      i += pair ? 11 : 5;
    } else {
      out += line[i];
      if (line[i] == mark) out += mark;
      if (line[i] == '\\' && i + 1 < line.size()) out += line[++i];  // it escapes no other
    }
  }
  return out;
}

std::string to_bytes(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != mark) {
      out += text[i];
    } else if (text[++i] == mark) {
      out += mark;
    } else {
      out += static_cast<char>((text[i] - 'a') * 16 + (text[i + 1] - 'a'));
      ++i;
    }
  }
  return out;
}

}  // namespace

/// A file read from front to back through a buffer.
class Corpus::Reader {
 public:
  Reader(std::string name, int file, bool jsonl)
      : name(std::move(name)), jsonl(jsonl), file_(file) {}
  ~Reader() { close(file_); }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  /// At least `bytes` unread bytes, fewer only at the end of the file.
  std::string_view peek(size_t bytes) {
    while (!ended_ && buffer_.size() - begin_ < bytes) {
      buffer_.erase(0, std::exchange(begin_, 0));
      const size_t had = buffer_.size(), step = size_t{1} << 20;
      buffer_.resize(had + step);
      const ssize_t n = read(file_, buffer_.data() + had, step);
      require(n >= 0, "{}: {}", name, std::strerror(errno));
      buffer_.resize(had + static_cast<size_t>(n));
      crc = crc32_z(crc, reinterpret_cast<const Bytef*>(buffer_.data() + had),
                    static_cast<size_t>(n));
      size += n;
      ended_ = n == 0;
    }
    return std::string_view(buffer_).substr(begin_);
  }
  void skip(size_t bytes) { begin_ += bytes; }

  const std::string name;
  const bool jsonl;
  int64_t line = 0;       // number of the last one read
  int64_t size = 0;       // bytes read from the file
  unsigned long crc = 0;  // of them

 private:
  int file_;
  bool ended_ = false;
  std::string buffer_;
  size_t begin_ = 0;  // of the unread part
};

Corpus::Corpus(const std::vector<std::string>& inputs, Options options)
    : options_(std::move(options)) {
  for (const std::string& input : inputs) {
    if (input == "-" || exists(input)) {
      add(input);
    } else {
      const auto matches = expand(input);
      require(!matches.empty(), "{}: no such file or folder", input);
      for (const std::string& match : matches) add(match);
    }
  }
  const auto is_input = [](const Source& s) { return s.path == "-"; };
  const auto inputs_named = std::count_if(sources_.begin(), sources_.end(), is_input);
  require(inputs_named <= 1, "standard input (-) can be read only once");
  if (inputs_named == 1 && options_.twice) kept_input_ = keep_standard_input();
  if (inputs_named == 1) return;
  for (const Source& source : sources_) {
    std::error_code error;
    const auto size = fs::file_size(source.path, error);  // a pipe has none
    if (!error) bytes_total_ += static_cast<int64_t>(size);
  }
}

int64_t Corpus::bytes_read() const {
  return bytes_read_ + (reader_ ? reader_->size : 0);
}

Corpus::~Corpus() {
  if (kept_input_ >= 0) close(kept_input_);
}

void Corpus::add(const std::string& path) {
  std::error_code error;
  if (!fs::is_directory(path, error)) return sources_.push_back({path, false});
  std::vector<std::string> files;
  fs::recursive_directory_iterator it(path, error), end;
  for (; !error && it != end; it.increment(error)) {
    if (it->path().filename().string().starts_with('.'))
      it.disable_recursion_pending();
    else if (std::error_code unknown; it->is_regular_file(unknown))
      files.push_back(it->path().string());
  }
  require(!error, "{}: cannot read the folder: {}", path, error.message());
  std::sort(files.begin(), files.end());
  for (std::string& file : files) sources_.push_back({std::move(file), true});
}

bool Corpus::is_jsonl(const std::string& path) const {
  return !options_.jsonl_field.empty() || path.ends_with(".jsonl") || path.ends_with(".ndjson");
}

void Corpus::open_next() {
  const Source& source = sources_[at_++];
  const bool input = source.path == "-";
  const int file = !input             ? open(source.path.c_str(), O_RDONLY | O_CLOEXEC)
                   : kept_input_ >= 0 ? dup(kept_input_)
                                      : dup(STDIN_FILENO);
  const std::string name = input ? "standard input" : source.path;
  require(file >= 0, "{}: {}", name, std::strerror(errno));
  if (input && kept_input_ >= 0) lseek(file, 0, SEEK_SET);
  reader_ = std::make_unique<Reader>(name, file, is_jsonl(source.path));
  const std::string_view start = reader_->peek(binary_probe).substr(0, binary_probe);
  if (source.in_folder && start.find('\0') != std::string_view::npos) {
    ++binaries_skipped_;
    bytes_read_ += reader_->size;
    reader_.reset();
  }
}

void Corpus::close_current() {
  manifest_ += fmt::format("{:08x} {} {}\n", reader_->crc, reader_->size, reader_->name);
  ++files_read_;
  bytes_read_ += reader_->size;
  reader_.reset();
}

bool Corpus::next(std::string& document) {
  for (;;) {
    while (!reader_) {
      if (at_ == sources_.size()) return false;
      open_next();
    }
    const bool found = reader_->jsonl ? next_line(document) : next_text(document);
    if (found && !document.empty()) return true;
    if (!found) close_current();
  }
}

bool Corpus::next_text(std::string& document) {
  const std::string_view text = reader_->peek(document_bytes + 1);
  document = text.substr(0, segment_length(text, document_bytes));
  reader_->skip(document.size());
  return !document.empty();
}

bool Corpus::next_line(std::string& document) {
  std::string_view text = reader_->peek(1);
  size_t end = text.find('\n');
  while (end == std::string_view::npos) {
    const size_t had = text.size();
    text = reader_->peek(had + 1);
    if (text.size() == had) break;
    end = text.find('\n', had);
  }
  if (text.empty()) return false;
  const std::string_view line = text.substr(0, end);
  reader_->skip(std::min(text.size(), line.size() + 1));
  ++reader_->line;
  document.clear();
  if (line.find_first_not_of(" \t\r") == std::string_view::npos) return true;

  const std::string field = options_.jsonl_field.empty() ? "text" : options_.jsonl_field;
  auto object = nlohmann::json::parse(line, nullptr, false);
  const bool hidden = object.is_discarded();  // perhaps for its bytes
  if (hidden) object = nlohmann::json::parse(to_ascii(line), nullptr, false);
  require(object.is_object(), "{}:{}: not a JSON object", reader_->name, reader_->line);
  auto value = object.begin();
  while (value != object.end() && (hidden ? to_bytes(value.key()) : value.key()) != field) ++value;
  require(value != object.end() && value->is_string(),
          "{}:{}: no text under \"{}\"; name the field with --jsonl-field", reader_->name,
          reader_->line, field);
  document = value->get<std::string>();
  if (hidden) document = to_bytes(document);
  return true;
}

void Corpus::rewind() {
  require(options_.twice, "this corpus was opened to be read once");
  at_ = 0;
  reader_.reset();
  manifest_.clear();
  bytes_read_ = files_read_ = binaries_skipped_ = 0;
}

}  // namespace entrain
