#include "data/tokenizer.h"

#include <sentencepiece_processor.h>
#include <sentencepiece_trainer.h>

#include <regex>
#include <unordered_map>

#include "core/error.h"

namespace entrain {
namespace {

constexpr size_t segment_bytes = 4096;
constexpr std::string_view space_symbol = "\xE2\x96\x81";  // U+2581

/// Bytes of the UTF-8 character that text starts with, 0 when it is not valid.
size_t character_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const unsigned char lead = byte(0);
  if (lead < 0x80) return 1;
  const size_t length = lead >= 0xF5   ? 0
                        : lead >= 0xF0 ? 4
                        : lead >= 0xE0 ? 3
                        : lead >= 0xC2 ? 2
                                       : 0;
  if (length == 0 || length > text.size()) return 0;
  for (size_t i = 1; i < length; ++i)
    if ((byte(i) & 0xC0) != 0x80) return 0;
  const unsigned char second = byte(1);
  const bool overlong = (lead == 0xE0 && second < 0xA0) || (lead == 0xF0 && second < 0x90);
  const bool surrogate = lead == 0xED && second >= 0xA0;
  const bool beyond = lead == 0xF4 && second >= 0x90;
  return overlong || surrogate || beyond ? 0 : length;
}

/// Bytes of text, from its start, that the model may see.
size_t plain_length(std::string_view text) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t n = character_length(text.substr(at));
    if (n == 0 || text.substr(at, n) == space_symbol) break;
    at += n;
  }
  return at;
}

/// What a piece stands for in the text.
std::string surface(std::string_view piece) {
  std::string text;
  for (size_t at = 0; at < piece.size();) {
    const bool space = piece.substr(at).starts_with(space_symbol);
    text += space ? ' ' : piece[at];
    at += space ? space_symbol.size() : 1;
  }
  return text;
}

/// A model that leaves its input as it is. Appending a field to a serialized protocol buffer merges
/// into what is there; here the normalizer (3): precompiled_charsmap (2) = "", add_dummy_prefix (3)
/// and remove_extra_whitespaces (4) = false, escape_whitespaces (5) = true.
std::string without_normalization(const std::string& model) {
  return model + std::string("\x1A\x08\x12\x00\x18\x00\x20\x00\x28\x01", 10);
}

/// Feeds spans to the trainer, which would otherwise read lines from a file and lose line ends.
class Spans : public sentencepiece::SentenceIterator {
 public:
  explicit Spans(std::vector<std::string> spans) : spans_(std::move(spans)) {}
  bool done() const override { return at_ == spans_.size(); }
  void Next() override { ++at_; }
  const std::string& value() const override { return spans_[at_]; }
  sentencepiece::util::Status status() const override { return {}; }

 private:
  std::vector<std::string> spans_;
  size_t at_ = 0;
};

/// Cuts text into what the model may see and bytes that it may not, in order.
template <class Plain, class Bytes>
void cut(std::string_view text, Plain&& plain, Bytes&& bytes) {
  while (!text.empty()) {
    size_t n = plain_length(text.substr(0, segment_length(text, segment_bytes)));
    if (n > 0) {
      plain(text.substr(0, n));
    } else {
      n = text.starts_with(space_symbol) ? space_symbol.size() : 1;
      bytes(text.substr(0, n));
    }
    text.remove_prefix(n);
  }
}

}  // namespace

Tokenizer::Tokenizer(std::string name, std::string model)
    : name_(std::move(name)), model_(std::move(model)) {
  const auto add = [&](std::string text) {
    text_.push_back(std::move(text));
    return static_cast<int32_t>(text_.size() - 1);
  };
  byte_ids_.fill(-1);
  end_of_document_ = -1;
  if (name_ != "bytes") {
    processor_ = std::make_shared<sentencepiece::SentencePieceProcessor>();
    const auto status = processor_->LoadFromSerializedProto(without_normalization(model_));
    require(!model_.empty() && status.ok(), "tokenizer {}: not a SentencePiece model", name_);
    end_of_document_ = processor_->eos_id();
    for (int id = 0; id < processor_->GetPieceSize(); ++id) {
      const std::string& piece = processor_->IdToPiece(id);
      if (processor_->IsByte(id)) {
        const int byte = std::stoi(piece.substr(3, 2), nullptr, 16);  // "<0xE2>"
        byte_ids_[static_cast<size_t>(byte)] = add({static_cast<char>(byte)});
      } else {
        const bool silent = processor_->IsControl(id) || processor_->IsUnknown(id);
        add(silent ? std::string() : surface(piece));
      }
    }
  }
  for (int byte = 0; byte < 256; ++byte)
    if (int32_t& id = byte_ids_[static_cast<size_t>(byte)]; id < 0)
      id = add(std::string(1, static_cast<char>(byte)));
  if (end_of_document_ < 0) end_of_document_ = add("");
}

void Tokenizer::encode_bytes(std::string_view bytes, std::vector<int32_t>& ids) const {
  for (char c : bytes) ids.push_back(byte_ids_[static_cast<unsigned char>(c)]);
}

void Tokenizer::encode_plain(std::string_view utf8, std::vector<int32_t>& ids) const {
  const auto encoded = processor_->EncodeAsImmutableProto(utf8);
  for (const auto& piece : encoded.pieces()) {
    const auto id = static_cast<int>(piece.id());
    if (processor_->IsUnknown(id))
      encode_bytes(piece.surface(), ids);
    else
      ids.push_back(id);
  }
}

void Tokenizer::encode(std::string_view text, std::vector<int32_t>& ids) const {
  if (!processor_) return encode_bytes(text, ids);
  cut(
      text, [&](std::string_view plain) { encode_plain(plain, ids); },
      [&](std::string_view bytes) { encode_bytes(bytes, ids); });
}

std::vector<int32_t> Tokenizer::encode(std::string_view text) const {
  std::vector<int32_t> ids;
  encode(text, ids);
  return ids;
}

std::string Tokenizer::decode(std::span<const int32_t> ids) const {
  std::string text;
  for (int32_t id : ids) {
    require(id >= 0 && id < vocab(), "token id {} is beyond the vocabulary of {}", id, vocab());
    text += text_[static_cast<size_t>(id)];
  }
  return text;
}

std::string train_bpe(const std::vector<std::string>& sample, int vocab) {
  const std::unordered_map<std::string, std::string> options = {
      {"model_type", "bpe"},
      {"vocab_size", std::to_string(vocab)},
      {"byte_fallback", "true"},
      {"normalization_rule_name", "identity"},
      {"add_dummy_prefix", "false"},
      {"remove_extra_whitespaces", "false"},
      {"allow_whitespace_only_pieces", "true"},
      {"max_sentence_length", std::to_string(segment_bytes + 1)},
      {"unk_id", "0"},
      {"eos_id", "1"},
      {"bos_id", "-1"},
      {"pad_id", "-1"},
      {"num_threads", "1"},
      {"minloglevel", "2"}};
  std::vector<std::string> plain;
  for (const std::string& text : sample)
    cut(
        text, [&](std::string_view span) { plain.emplace_back(span); }, [](std::string_view) {});
  Spans spans(std::move(plain));
  std::string model;
  const auto status = sentencepiece::SentencePieceTrainer::Train(options, &spans, &model);
  if (status.ok()) return model;
  const std::string why = status.ToString();
  std::smatch found;
  if (std::regex_search(why, found, std::regex("value <= ([0-9]+)")))
    fail("bpe:{}: the sample supports at most {} ids; give more text or take bpe:{}", vocab,
         found.str(1), found.str(1));
  if (std::regex_search(why, found, std::regex("required_chars\\. [0-9]+ vs ([0-9]+)")))
    fail("bpe:{}: bytes and characters of the sample alone need {} ids; take bpe:{} or more", vocab,
         found.str(1), found.str(1));
  fail("bpe:{}: SentencePiece cannot train on this sample: {}", vocab, why);
}

size_t segment_length(std::string_view text, size_t limit) {
  if (text.size() <= limit) return text.size();
  if (const size_t line = text.rfind('\n', limit - 1); line != std::string_view::npos)
    return line + 1;
  for (size_t back = 1; back <= 4 && back <= limit; ++back)
    if (const size_t n = character_length(text.substr(limit - back)); n > 0)
      return n <= back ? limit - back + n : limit - back;
  return limit;
}

}  // namespace entrain
