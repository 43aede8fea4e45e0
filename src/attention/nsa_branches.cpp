#include "attention/nsa_branches.h"

#include "attention/record_attention.h"

namespace entrain {
namespace {

struct Branch {
  const char* name;
  Var k, v, gate;
  BlockSet blocks;
  bool counts;  // what it reads makes the density
};

}  // namespace

Tensor record_nsa(Tape& tape, const BlockSelection& selection, int64_t window, const NsaInput& in,
                  Var o) {
  const Var q = in.q, kc = in.kc;
  const int64_t B = q.value[0], Hq = q.value[1], N = q.value[2], Hkv = in.ks.value[1];
  const int64_t M = (in.ks.value[2] + selection.block - 1) / selection.block;
  const Queries queries{N, in.first};
  const Tensor mask = tape.keep({B, Hkv, N, (M + 63) / 64}, DType::u64);
  const BlockSet compressed{.keys = selection.runs()};
  const BlockSet selected{.block = selection.block, .mask = mask};
  const BlockSet last{.window = window};

  tape.record("selection", {}, {}, [=, read = in.read](auto kernels) {
    kernels.select_blocks(q.value, queries.seen(kc.value, selection.runs()), selection,
                          queries.attend(selected), {}, read);
    kernels.read_window(queries.attend(selected), window, read);
  });

  const Branch branches[] = {
      {"compressed", kc, in.vc, in.gates[0], compressed, false},
      {"selected", in.ks, in.vs, in.gates[1], selected, true},
      {"window", in.kw, in.vw, in.gates[2], last, false},
  };
  for (size_t i = 0; i < 3; ++i) {
    const Branch x = branches[i];
    const bool first = i == 0, last_one = i == 2;
    const Tensor out = tape.keep(q.value.shape), lse = tape.keep({B, Hq, N}, tape.sum_dtype());
    const AttentionScratch scratch = attention_scratch(tape, q.value, in.ks.value, queries);
    const Tensor dout = tape.training() ? tape.scratch(q.value.shape) : Tensor{};
    tape.record(
        x.name, out, q.grad,
        [=, read = in.read](auto kernels) {
          const Runs runs = x.blocks.keys;
          kernels.attention(q.value, queries.seen(x.k.value, runs), queries.seen(x.v.value, runs),
                            queries.attend(x.blocks), out, lse, scratch.forward, read, !x.counts);
          kernels.scale_rows(out, x.gate.value, !first, o.value);
        },
        [=](auto kernels) {
          // The last branch comes first here: it writes q's gradient, the others add to it.
          kernels.scale_rows_backward(o.grad, out, x.gate.value, dout, x.gate.grad);
          kernels.attention_backward(q.value, x.k.value, x.v.value, out, dout, lse, x.blocks,
                                     q.grad, x.k.grad, x.v.grad, {}, scratch.backward, !last_one);
        },
        {x.gate.grad, x.k.grad, x.v.grad});
  }
  return mask;
}

}  // namespace entrain
