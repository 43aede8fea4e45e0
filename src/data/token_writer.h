#pragma once
// Writes token stores (token_store.h) larger than memory.
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "data/token_store.h"

namespace entrain {

/// Tokens go to unnamed temporary files beside the output, since HDF5 stores in one piece only what
/// it knows the length of. The store appears under its name when finish() returns, and not before.
class TokenWriter {
 public:
  /// Throws Error when the folder of the output cannot be written to, or when anything but a token
  /// store has its name.
  TokenWriter(const std::string& path, int vocab);
  ~TokenWriter();

  /// Appends one document with its end-of-document id. answers: which of its ids answer a question,
  /// ascending.
  void add(Split split, std::span<const int32_t> ids, std::span<const int64_t> answers = {});

  struct Description {
    std::string tokenizer;        // as on the command line
    std::string tokenizer_model;  // serialized; empty for bytes
    std::string provenance;       // JSON
    std::string manifest;         // one line a file
  };
  /// Writes the store, flushes it to the disk and gives it its name, replacing an older one.
  void finish(const Description& description);

 private:
  class Spool;
  struct SplitSpools;
  std::string path_;
  int vocab_;
  std::array<std::unique_ptr<SplitSpools>, 2> splits_;
};

}  // namespace entrain
