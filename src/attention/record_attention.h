#pragma once
// The last op of methods that attend one set of blocks, and its scratch memory.
#include "attention/attention.h"

namespace entrain {

/// Scratch of attention of queries over keys: empty where it is not needed.
struct AttentionScratch {
  Tensor forward, backward;
};
AttentionScratch attention_scratch(Tape& tape, Tensor q, Tensor k, Queries queries);

/// Records softmax attention of in.q over the blocks of in.k and in.v, forward to o and backward to
/// their gradients. dbias [B, Hkv, N, M], or empty: the gradient of blocks.bias.
void record_attention(Tape& tape, const AttentionInput& in, const BlockSet& blocks, Tensor dbias,
                      Var o);

}  // namespace entrain
