#pragma once
// Text to token ids and back without losing a byte: decode(encode(x)) == x for any bytes.
#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace sentencepiece {
class SentencePieceProcessor;
}

namespace entrain {

/// `bytes` maps every byte to its own id. The others are SentencePiece models: text that is valid
/// UTF-8 goes through the model with its normalization switched off, every other byte and U+2581
/// (which SentencePiece writes for a space) become the model's byte pieces. Ids that a given model
/// lacks, bytes or end of document, follow after its own.
class Tokenizer {
 public:
  /// From a name ("bytes", "bpe:2048", "spm:FILE") and the serialized model, empty for bytes: the
  /// two things a token store and a checkpoint keep. Throws Error for a model that cannot be read.
  explicit Tokenizer(std::string name = "bytes", std::string model = "");

  const std::string& name() const { return name_; }
  const std::string& model() const { return model_; }
  int vocab() const { return static_cast<int>(text_.size()); }
  int32_t end_of_document() const { return end_of_document_; }

  /// Appends the ids of text, without an end of document. Safe to call from several threads.
  void encode(std::string_view text, std::vector<int32_t>& ids) const;
  std::vector<int32_t> encode(std::string_view text) const;

  /// The bytes of ids; the end of document and a model's control ids have none. Throws Error for an
  /// id outside the vocabulary.
  std::string decode(std::span<const int32_t> ids) const;

 private:
  void encode_bytes(std::string_view bytes, std::vector<int32_t>& ids) const;
  void encode_plain(std::string_view utf8, std::vector<int32_t>& ids) const;

  std::string name_;
  std::string model_;
  std::shared_ptr<sentencepiece::SentencePieceProcessor> processor_;
  std::array<int32_t, 256> byte_ids_{};
  std::vector<std::string> text_;  // of each id
  int32_t end_of_document_ = 0;
};

/// Trains a byte-pair encoding of exactly `vocab` ids, end of document and 256 bytes included, and
/// returns the serialized SentencePiece model. Throws Error naming the possible sizes when the
/// sample supports no such vocabulary.
std::string train_bpe(const std::vector<std::string>& sample, int vocab);

/// The length of the first segment of text, at most `limit` bytes: up to the last line end within
/// the limit, else up to the last whole UTF-8 character. Segments bound the memory and time an
/// encoder needs and depend on nothing but the text.
size_t segment_length(std::string_view text, size_t limit);

}  // namespace entrain
