#pragma once
// Token stores: HDF5 files of token ids, split into train and validation by document, read through
// a memory map. h5ls explains the layout; SPLIT is train or validation:
//   /SPLIT/tokens            u16 (u32 for more than 65536 ids), one dimension, stored in one piece
//   /SPLIT/document_offsets  u64, the first token of each document, then the number of tokens
//   /SPLIT/answers           u64, ascending: the tokens that answer a question, whose prediction
//                            `entrain eval` judges; absent where there are none
//   /tokenizer_model         u8, the serialized SentencePiece model; empty for bytes
//   /manifest                u8, text: checksum, size and path of each file read, one a line
// Attributes of the root: format, vocab_size, tokenizer, provenance (JSON). Every dataset carries
// crc32, its contents' checksum, only the manifest of older stores none; HDF5 itself checks the
// metadata.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "core/tensor.h"

namespace entrain {

enum class Split : uint8_t { train, validation };

const char* name_of(Split split);

class TokenStore {
 public:
  /// Throws Error when the file is missing, truncated, not a token store, or (verify) its checksums
  /// do not match, an id is not below vocab() or answers are out of order or of the split.
  /// Verifying reads the whole file once.
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
  int64_t answers(Split split) const;

  /// Copies tokens [begin, begin + count) of a split. Throws Error for an id >= vocab().
  void read(Split split, int64_t begin, int64_t count, int32_t* into) const;

  /// The answers among tokens [begin, begin + count) of a split, as positions in the split.
  std::vector<int64_t> answers(Split split, int64_t begin, int64_t count) const;

 private:
  struct Mapped;
  std::unique_ptr<Mapped> mapped_;
};

}  // namespace entrain
