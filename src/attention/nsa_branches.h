#pragma once
// NSA's core (arXiv 2502.11089): attention of the same queries over compressed windows, over blocks
// that the compressed weights select, and over the last tokens, mixed by gates.
#include <array>

#include "attention/queries.h"
#include "core/tape.h"
#include "kernels/kernels.h"

namespace entrain {

struct NsaInput {
  Var q;                           // [B, Hq, N, D]
  Var kc, vc;                      // compressed: [B, Hkv, selection.windows(N), D], contiguous
  Var ks, vs, kw, vw;              // selected and window: [B, Hkv, N, D]
  std::array<Var, 3> gates;        // compressed, selected, window: [B, Hq, N, 1]
  Tensor read;                     // see ReadField
  const int64_t* first = nullptr;  // while decoding, as in Queries: keys and values then hold the
                                   // rows of all tokens, with room for those to come
};

/// Records the branches and their sum o. Gradients reach all but the choice of blocks. Returns that
/// choice, as BlockSet::mask. Pairs read are the tokens of selected blocks and those of the window
/// that none of them holds, blocks the selected ones; what the router reads are compressed entries.
Tensor record_nsa(Tape& tape, const BlockSelection& selection, int64_t window, const NsaInput& in,
                  Var o);

}  // namespace entrain
