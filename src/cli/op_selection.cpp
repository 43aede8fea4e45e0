// What the operations that select blocks share, and entrain op nsa.
#include "attention/nsa_branches.h"
#include "cli/op.h"

namespace entrain::cli {

BlockSelection read_selection(const Case& c) {
  auto whole = [&](const char* name, int64_t otherwise) {
    return static_cast<int64_t>(c.parameter(name, static_cast<double>(otherwise)));
  };
  const BlockSelection paper;
  const BlockSelection selection{.block = whole("block", paper.block),
                                 .topk = whole("topk", paper.topk),
                                 .init_blocks = whole("init_blocks", paper.init_blocks),
                                 .local_blocks = whole("local_blocks", paper.local_blocks),
                                 .length = whole("l", paper.length),
                                 .stride = whole("d", paper.stride)};
  require(selection.block > 0 && selection.topk > 0 && selection.length > 0 &&
              selection.stride > 0 && selection.init_blocks >= 0 && selection.local_blocks >= 0,
          "{}: block, topk, l and d must be positive, init_blocks and local_blocks not negative",
          c.where());
  return selection;
}

void write_selected(Case& c, Tensor mask, int64_t M) {
  const Tensor selected = c.host_result("out/selected", {mask[0], mask[1], mask[2], M}, DType::u8);
  for (int64_t i = 0; i < selected.numel() / M; ++i) {
    const uint64_t* words = mask.ptr<uint64_t>() + i * mask[3];
    for (int64_t j = 0; j < M; ++j) {
      selected.ptr<uint8_t>()[i * M + j] = words[j / 64] >> (j % 64) & 1;
    }
  }
}

void write_density(Case& c, Tensor read) {
  double pairs = 0, causal = 0;
  const double* fields = c.host(read).ptr<double>();
  for (int64_t r = 0; r < read[0]; ++r, fields += read_fields) {
    pairs += fields[read_pairs];
    causal += fields[read_causal];
  }
  c.host_result("out/density", {1}, DType::f64).ptr<double>()[0] = pairs / causal;
}

void run_nsa(Case& c) {
  BlockSelection selection = read_selection(c);
  selection.score = BlockScore::sum;
  const auto window = static_cast<int64_t>(c.parameter("window", 512));
  require(window > 0 && selection.length % selection.stride == 0 &&
              selection.block % selection.stride == 0,
          "{}: window must be positive, l and block multiples of d", c.where());

  const bool training = c.has("dout");
  const auto input = [&](const std::string& name, Shape shape) {
    const Tensor value = c.input(name, c.real, 4, true);
    require(value.shape == shape, "{}: {} is {}, not {}, as q, ks, l and d ask for", c.where(),
            name, value.shape.to_string(), shape.to_string());
    return Var{value, training ? c.result("grad/" + name, shape) : Tensor{}};
  };
  const Shape queries = c.input("q", c.real, 4).shape;
  const int64_t B = queries[0], Hq = queries[1], N = queries[2], D = queries[3];
  const int64_t Hkv = c.input("ks", c.real, 4)[1];
  require(Hq % Hkv == 0, "{}: {} query heads over {} key-value heads", c.where(), Hq, Hkv);
  const Shape tokens{B, Hkv, N, D}, windows{B, Hkv, selection.windows(N), D};
  const Var gate = input("gate", {B, Hq, N, 3});
  const auto branch = [&](int i) {
    return Var{gate.value.slice(3, i, 1), training ? gate.grad.slice(3, i, 1) : Tensor{}};
  };
  const NsaInput in{.q = input("q", queries),
                    .kc = input("kc", windows),
                    .vc = input("vc", windows),
                    .ks = input("ks", tokens),
                    .vs = input("vs", tokens),
                    .kw = input("kw", tokens),
                    .vw = input("vw", tokens),
                    .gates = {branch(0), branch(1), branch(2)},
                    .read = c.make({Hkv, read_fields}, DType::f64)};
  Var o{c.result("out/out", queries), {}};
  if (training) {
    o.grad = c.input("dout", c.real, 4);
    require(o.grad.shape == queries, "{}: dout {} is not of the shape of q {}", c.where(),
            o.grad.shape.to_string(), queries.to_string());
  }

  TapeMemory memory(c.device);
  for (const bool committed : {false, true}) {
    if (committed) memory.commit();
    Tape tape(memory, {.dtype = c.real, .training = training});
    const Tensor mask = record_nsa(tape, selection, window, in, o);
    if (!committed) continue;
    tape.forward();
    tape.backward();
    Mirror chosen(mask);
    chosen.download();
    write_selected(c, chosen.host(), (N + selection.block - 1) / selection.block);
  }
  write_density(c, in.read);
}

}  // namespace entrain::cli
