#pragma once
// Decoding of one sequence, token by token or in larger pieces, against caches of what came before.
#include <memory>
#include <span>
#include <vector>

#include "core/mirror.h"
#include "model/decoder.h"

namespace entrain {

class Generator {
 public:
  /// A sequence of up to `capacity` tokens, no more than the decoder was made for.
  Generator(Decoder& decoder, int64_t capacity);
  Generator(const Generator&) = delete;  // tapes refer to the cache
  Generator& operator=(const Generator&) = delete;

  /// Appends tokens, at least one, to the sequence. The logits [1, vocab] of what follows them stay
  /// until the next call. Throws Error when the sequence would exceed the capacity.
  Tensor append(std::span<const int32_t> tokens);

 private:
  struct Piece {
    std::unique_ptr<Tape> tape;
    Mirror tokens, logits;
  };

  DecoderCache cache_;
  TapeMemory memory_;  // of all tapes: one runs at a time
  std::vector<Piece> pieces_;
};

}  // namespace entrain
