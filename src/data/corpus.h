#pragma once
// Text as users keep it, one document after the other.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace entrain {

/// Documents of files, folders, globs and standard input ("-"), in the order given. A folder gives
/// its files sorted by path, without hidden ones and without binary ones (a NUL byte in the first
/// 8 KiB); a file or glob that is named is read whatever it holds. Bytes are kept as they are.
///
/// A text file is one document, or several of at most 1 MiB cut at line ends, so that any length
/// fits memory. Files ending in .jsonl or .ndjson, and every input where a field is named, are JSON
/// lines: each line an object whose field holds the document. Their strings need not be UTF-8.
class Corpus {
 public:
  struct Options {
    std::string jsonl_field;  // empty: "text", for files with the endings above only
    bool twice = false;       // rewind() will be called: keeps standard input in a temporary file
  };

  /// Throws Error for an input that does not exist or a glob that matches nothing.
  Corpus(const std::vector<std::string>& inputs, Options options);
  ~Corpus();

  /// The next document that is not empty; false at the end. Throws Error naming file and line for
  /// JSON that is broken or lacks the field.
  bool next(std::string& document);
  void rewind();

  int64_t bytes_total() const { return bytes_total_; }  // 0: unknown
  int64_t bytes_read() const;                           // since the start or rewind()
  int64_t files_read() const { return files_read_; }
  int64_t binaries_skipped() const { return binaries_skipped_; }
  /// A line for each file read: crc32 in hexadecimal, size, path.
  const std::string& manifest() const { return manifest_; }

 private:
  class Reader;
  struct Source {
    std::string path;
    bool in_folder = false;
  };
  void add(const std::string& path);
  bool next_text(std::string& document);
  bool next_line(std::string& document);
  bool is_jsonl(const std::string& path) const;
  void open_next();
  void close_current();

  Options options_;
  std::vector<Source> sources_;
  size_t at_ = 0;  // of the source that is read next
  std::unique_ptr<Reader> reader_;
  int kept_input_ = -1;  // the copy of standard input
  int64_t bytes_total_ = 0, bytes_read_ = 0, files_read_ = 0, binaries_skipped_ = 0;
  std::string manifest_;
};

}  // namespace entrain
