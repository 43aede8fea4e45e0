#pragma once
// Token stores: HDF5 files of token ids, split into train and validation by document, read through
// a memory map. Layout (h5ls explains it): /train/tokens, /validation/tokens (u16 or u32, 1-D,
// contiguous), /<split>/document_offsets (u64, first token of each document, then the total);
// attributes of the root: format, vocab_size, tokenizer, tokenizer_model (bytes), provenance (JSON),
// and a checksum for each dataset.
#include <cstdint>
#include <memory>
#include <string>

#include "core/tensor.h"

namespace entrain {

enum class Split : uint8_t { train, validation };

class TokenStore {
 public:
  /// Throws Error when the file is missing, truncated, not a token store, or (verify) its checksums
  /// do not match.
  explicit TokenStore(const std::string& path, bool verify = true);
  ~TokenStore();

  const std::string& path() const;
  int vocab() const;
  std::string tokenizer() const;        // "bytes", "bpe:2048", ...
  std::string tokenizer_model() const;  // serialized SentencePiece model; empty for bytes
  std::string provenance() const;       // JSON
  std::string fingerprint() const;      // hash over all contents, for checkpoints to compare

  int64_t tokens(Split split) const;
  int64_t documents(Split split) const;

  /// Copies tokens [begin, begin + count) of a split. Throws Error for an id >= vocab().
  void read(Split split, int64_t begin, int64_t count, int32_t* into) const;

 private:
  struct Mapped;
  std::unique_ptr<Mapped> mapped_;
};

}  // namespace entrain
