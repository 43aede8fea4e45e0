#include "data/sampler.h"

#include <numeric>
#include <utility>

#include "core/error.h"
#include "core/rng.h"

namespace entrain {
namespace {

/// Keeps epochs apart from the streams that other users of the seed number from zero.
constexpr uint64_t first_stream = uint64_t{1} << 32;

void shuffle(std::vector<uint32_t>& order, uint64_t seed, int64_t epoch) {
  std::iota(order.begin(), order.end(), 0u);
  Rng rng(seed, first_stream + static_cast<uint64_t>(epoch));
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[rng.below(i)]);
}

}  // namespace

Sampler::Sampler(const TokenStore& store, int seq_len, uint64_t seed)
    : store_(store), seq_len_(seq_len), seed_(seed) {
  require(seq_len > 0, "data.seq_len is {}, expected at least 1", seq_len);
  const int64_t tokens = store.tokens(Split::train);
  require(tokens > seq_len,
          "{}: the training split has {} tokens, data.seq_len {} needs at least {}; shorten the "
          "sequences or tokenize more text",
          store.path(), tokens, seq_len, seq_len + 1);
  const int64_t sequences = (tokens - 1) / seq_len;  // the last token has no target
  require(sequences <= UINT32_MAX, "{}: {} sequences of {} tokens are too many; lengthen them",
          store.path(), sequences, seq_len);
  order_.resize(static_cast<size_t>(sequences));
}

int64_t Sampler::sequences() const {
  return std::ssize(order_);
}

void Sampler::fill(int64_t first, Tensor tokens, Tensor targets) {
  require(tokens.shape.rank == 2 && tokens[1] == seq_len_ && targets.shape == tokens.shape &&
              tokens.contiguous() && targets.contiguous(),
          "a batch is [batch, {}], got {} and {}", seq_len_, tokens.shape.to_string(),
          targets.shape.to_string());
  for (int64_t b = 0; b < tokens[0]; ++b) {
    const int64_t number = first + b, epoch = number / sequences();
    if (epoch != epoch_) shuffle(order_, seed_, epoch_ = epoch);
    const int64_t begin = order_[static_cast<size_t>(number % sequences())] * seq_len_;
    store_.read(Split::train, begin, seq_len_, tokens.ptr<int32_t>() + b * seq_len_);
    store_.read(Split::train, begin + 1, seq_len_, targets.ptr<int32_t>() + b * seq_len_);
  }
}

}  // namespace entrain
