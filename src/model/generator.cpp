#include "model/generator.h"

#include <algorithm>

namespace entrain {
namespace {

constexpr int64_t piece_sizes[] = {64, 8, 1};  // a tape each, largest first

}  // namespace

Generator::Generator(Decoder& decoder, int64_t capacity)
    : cache_(decoder.make_cache(capacity)), memory_(decoder.device()) {
  for (const bool committed : {false, true}) {
    if (committed) memory_.commit();
    pieces_.clear();
    for (const int64_t size : piece_sizes) {
      if (size > capacity) continue;
      memory_.rewind();
      Piece& piece = pieces_.emplace_back();
      piece.tape = std::make_unique<Tape>(memory_, Tape::Options{.dtype = decoder.dtype()});
      piece.tokens = Mirror(piece.tape->keep({1, size}, DType::i32));
      piece.logits = Mirror(decoder.decode(*piece.tape, piece.tokens.tensor(), cache_));
    }
  }
}

Tensor Generator::append(std::span<const int32_t> tokens) {
  const int64_t room = cache_.capacity - cache_.tokens;
  require(!tokens.empty() && std::ssize(tokens) <= room,
          "{} tokens to append to {} where {} is the most", tokens.size(), cache_.tokens,
          cache_.capacity);
  Piece* last = nullptr;
  for (Piece& piece : pieces_) {
    const auto size = static_cast<size_t>(piece.tokens.host()[1]);
    for (; tokens.size() >= size; tokens = tokens.subspan(size)) {
      std::ranges::copy(tokens.first(size), piece.tokens.host().ptr<int32_t>());
      piece.tokens.upload();
      piece.tape->forward();
      last = &piece;
    }
  }
  last->logits.download();
  return last->logits.host();
}

}  // namespace entrain
