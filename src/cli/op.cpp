// entrain op METHOD --in x.h5 --out y.h5: one operation on tensors from a file, so that our code
// can be held against anyone else's. A group of the file is a case: attributes are parameters, in/*
// the inputs; out/* and, where in/dout is given, grad/* are written.
#include <bit>
#include <filesystem>
#include <functional>
#include <map>

#include "attention/attention.h"
#include "cli/commands.h"
#include "core/h5.h"
#include "kernels/kernels.h"
#include "model/decoder.h"

namespace entrain::cli {
namespace {

/// One group: reads inputs and parameters, collects results and writes them.
class Case {
 public:
  Case(const h5::File& in, std::string group, DType real)
      : real(real), in_(in), group_(std::move(group)) {}

  const DType real;  // type of the arithmetic

  bool has(const std::string& name) const { return in_.has(group_ + "/in/" + name); }
  std::vector<std::string> inputs() const { return in_.datasets(group_ + "/in"); }

  Tensor input(const std::string& name, DType dtype, int rank) {
    const std::string path = group_ + "/in/" + name;
    require(in_.has(path), "{}: case {} has no input in/{}", in_.path(), group_, name);
    const Shape shape = in_.shape(path);
    require(shape.rank == rank && shape.numel() > 0,
            "{}: {} has shape {}; {} dimensions are needed", in_.path(), path, shape.to_string(),
            rank);
    const Tensor t = make(shape, dtype);
    in_.read(path, t);
    return t;
  }

  double parameter(const std::string& name, double otherwise) const {
    return in_.has_attribute(group_, name) ? in_.number(group_, name) : otherwise;
  }
  int64_t required(const std::string& name) const {
    require(in_.has_attribute(group_, name), "{}: case {} has no attribute {}", in_.path(), group_,
            name);
    return in_.integer(group_, name);
  }
  std::string text(const std::string& name) const { return in_.text(group_, name); }
  std::string where() const { return in_.path() + ": case " + group_; }

  Tensor make(Shape shape) { return make(shape, real); }
  Tensor make(Shape shape, DType dtype) {
    memory_.emplace_back(static_cast<size_t>(shape.numel()) * size_of(dtype), Device::cpu);
    return Tensor::of(memory_.back().data(), shape, dtype);
  }
  Tensor result(const std::string& name, Shape shape) { return result(name, shape, real); }
  Tensor result(const std::string& name, Shape shape, DType dtype) {
    return results_[name] = make(shape, dtype);
  }

  void write(h5::File& out) const {
    for (const auto& [name, value] : results_) {
      out.write(group_ + "/" + name, value, h5::Pack::gzip);
    }
  }

 private:
  const h5::File& in_;
  std::string group_;
  std::vector<Buffer> memory_;
  std::map<std::string, Tensor> results_;
};

const Kernels<Device::cpu> kernels;

void check_alpha(const Case& c, double alpha) {
  require(alpha >= 1 && alpha <= 2, "{}: alpha is {}, not in [1, 2]", c.where(), alpha);
}

void run_entmax(Case& c) {
  const double alpha = c.parameter("alpha", 1.5);
  check_alpha(c, alpha);
  const Tensor z = c.input("z", c.real, 2), length = c.input("length", DType::i32, 1);
  require(length[0] == z[0], "{}: {} lengths for {} rows", c.where(), length[0], z[0]);
  for (int64_t r = 0; r < z[0]; ++r) {
    const int32_t n = length.ptr<int32_t>()[r];
    require(n >= 0 && n <= z[1], "{}: length {} of row {} is not in [0, {}]", c.where(), n, r,
            z[1]);
  }
  const Tensor p = c.result("out/out", z.shape);
  kernels.entmax(z, length, alpha, p);
  if (!c.has("dout")) return;
  const Tensor dout = c.input("dout", c.real, 2);
  kernels.entmax_backward(p, dout, alpha, c.result("grad/z", z.shape));
}

/// Inputs and results that full and dash share.
struct Attention {
  explicit Attention(Case& c)
      : q(c.input("q", c.real, 4)), k(c.input("k", c.real, 4)), v(c.input("v", c.real, 4)) {
    require(k.shape == v.shape && k[0] == q[0] && k[2] == q[2] && k[3] == q[3] && q[1] % k[1] == 0,
            "{}: q {}, k {} and v {} do not fit together", c.where(), q.shape.to_string(),
            k.shape.to_string(), v.shape.to_string());
    o = c.result("out/out", q.shape);
    lse = c.make({q[0], q[1], q[2]});
    keys = c.make(k.shape);
    read = c.make({k[1], read_fields}, DType::f64);
    if (!c.has("dout")) return;
    dout = c.input("dout", c.real, 4);
    require(dout.shape == q.shape, "{}: dout {} is not of the shape of q {}", c.where(),
            dout.shape.to_string(), q.shape.to_string());
    dq = c.result("grad/q", q.shape);
    dk = c.result("grad/k", k.shape);
    dv = c.result("grad/v", v.shape);
    scratch = c.make({kernels.attention_backward_scratch(q.shape, k.shape)});
  }

  Tensor q, k, v, o, lse, keys, read, dout, dq, dk, dv, scratch;
};

void run_full(Case& c) {
  const Attention a(c);
  kernels.attention(a.q, a.k, a.v, {}, a.o, a.lse, a.keys, a.read);
  if (!a.dout) return;
  kernels.attention_backward(a.q, a.k, a.v, a.o, a.dout, a.lse, {}, a.dq, a.dk, a.dv, {},
                             a.scratch);
}

void run_dash(Case& c) {
  const Attention a(c);
  const Tensor summary = c.input("summary_query", c.real, 2);
  const int64_t B = a.q[0], Hq = a.q[1], N = a.q[2], D = a.q[3], Hkv = a.k[1];
  require(summary[0] == Hkv && summary[1] == D, "{}: summary_query {} does not fit k {}", c.where(),
          summary.shape.to_string(), a.k.shape.to_string());
  const double gamma = c.parameter("gamma", 1.0);
  const DashRouting routing{.chunk = c.required("chunk"),
                            .alpha = c.parameter("alpha", 1.5),
                            .sigma = c.parameter("sigma", 1e6),
                            .prior_eps = c.parameter("prior_eps", 0),
                            .center = c.parameter("center", 1) != 0,
                            .init_blocks = static_cast<int64_t>(c.parameter("init_blocks", 0)),
                            .local_blocks = static_cast<int64_t>(c.parameter("local_blocks", 1)),
                            .gamma = &gamma};
  check_alpha(c, routing.alpha);
  require(routing.chunk > 0 && routing.init_blocks >= 0 && routing.local_blocks >= 0 &&
              routing.sigma > 0,
          "{}: chunk and sigma must be positive, init_blocks and local_blocks not negative",
          c.where());

  const int64_t M = (N + routing.chunk - 1) / routing.chunk;
  const Tensor kbar = c.make({B, Hkv, M, D}, DType::f64), tau = c.make({B, Hq, N}, DType::f64);
  const BlockSet blocks{.block = routing.chunk,
                        .mask = c.make({B, Hkv, N, (M + 63) / 64}, DType::u64),
                        .bias = c.make({B, Hkv, N, M})};
  const Tensor w = c.result("out/w", {B, Hkv, N, M});
  kernels.dash_summaries(a.k, summary, routing.chunk, kbar);
  kernels.dash_route(a.q, kbar, routing, tau, blocks, w, a.read);
  kernels.attention(a.q, a.k, a.v, blocks, a.o, a.lse, a.keys, a.read);

  const Tensor active = c.result("out/active", {B, Hkv, N}, DType::i32);
  for (int64_t i = 0; i < active.numel(); ++i) {
    for (int64_t word = 0; word < blocks.mask[3]; ++word) {
      active.ptr<int32_t>()[i] +=
          std::popcount(blocks.mask.ptr<uint64_t>()[i * blocks.mask[3] + word]);
    }
  }
  double pairs = 0, causal = 0;
  for (int64_t r = 0; r < Hkv; ++r) {
    pairs += a.read.ptr<double>()[r * read_fields + read_pairs];
    causal += a.read.ptr<double>()[r * read_fields + read_causal];
  }
  c.result("out/density", {1}, DType::f64).ptr<double>()[0] = pairs / causal;
  if (!a.dout) return;

  const Tensor dbias = c.make(blocks.bias.shape), dkbar = c.make(kbar.shape, DType::f64);
  const Tensor scratch =
      c.make({kernels.dash_route_backward_scratch(a.q.shape, kbar.shape)}, DType::f64);
  kernels.attention_backward(a.q, a.k, a.v, a.o, a.dout, a.lse, blocks, a.dq, a.dk, a.dv, dbias,
                             a.scratch);
  kernels.dash_route_backward(a.q, kbar, routing, tau, dbias, a.dq, dkbar, scratch);
  kernels.dash_summaries_backward(a.k, summary, routing.chunk, dkbar, a.dk,
                                  c.result("grad/summary_query", summary.shape));
}

/// A small decoder whose parameters are inputs under their Hugging Face names.
void run_model(Case& c) {
  const AttentionConfig attention{.method = c.text("method"),
                                  .chunk = static_cast<int>(c.parameter("chunk", 64)),
                                  .alpha = c.parameter("alpha", 1.5),
                                  .gamma = c.parameter("gamma", 1),
                                  .sigma = c.parameter("sigma", 1e6),
                                  .prior_eps = c.parameter("prior_eps", 0),
                                  .center = c.parameter("center", 1) != 0,
                                  .init_blocks = static_cast<int>(c.parameter("init_blocks", 0)),
                                  .local_blocks = static_cast<int>(c.parameter("local_blocks", 1))};
  auto whole = [&](const char* name) { return static_cast<int>(c.required(name)); };
  const ModelConfig model{.n_layer = whole("L"),
                          .d_model = whole("d"),
                          .n_head = whole("Hq"),
                          .n_kv_head = whole("Hkv"),
                          .head_dim = whole("D"),
                          .d_ff = whole("ff"),
                          .vocab = whole("V"),
                          .rope_theta = c.parameter("theta", 10000),
                          .norm_eps = c.parameter("eps", 1e-5),
                          .tie_embeddings = !c.has("lm_head.weight")};
  const Tensor tokens = c.input("tokens", DType::i32, 2),
               targets = c.input("targets", DType::i32, 2);
  require(tokens.shape == targets.shape, "{}: tokens {} and targets {} differ in shape", c.where(),
          tokens.shape.to_string(), targets.shape.to_string());
  for (int64_t i = 0; i < tokens.numel(); ++i) {
    for (const Tensor& t : {tokens, targets}) {
      require(t.ptr<int32_t>()[i] >= 0 && t.ptr<int32_t>()[i] < model.vocab,
              "{}: token id {} is beyond the vocabulary of {}", c.where(), t.ptr<int32_t>()[i],
              model.vocab);
    }
  }
  Decoder decoder(model, attention, tokens[1], 0, true, Device::cpu, c.real);
  for (const Param& p : decoder.params().all()) {
    const Tensor value = c.input(p.name, c.real, p.value.shape.rank);
    require(value.shape == p.value.shape, "{}: in/{} is {}, not {}", c.where(), p.name,
            value.shape.to_string(), p.value.shape.to_string());
    kernels.copy(value, p.value);
  }

  const int64_t T = tokens.numel();
  Tensor loss, logits;
  auto run = [&](Tape::Options options, auto build) {
    TapeMemory memory(Device::cpu);
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      Tape tape(memory, options);
      build(tape);
      if (!committed) continue;
      tape.forward();
      if (options.training) tape.backward();
      if (logits) kernels.copy(logits, c.result("out/logits", {tokens[0], tokens[1], model.vocab}));
      if (!loss) continue;
      double sum = 0;
      for (int64_t i = 0; i < T; ++i) {
        sum += c.real == DType::f64 ? loss.ptr<double>()[i] : loss.ptr<float>()[i];
      }
      c.result("out/loss", {1}, DType::f64).ptr<double>()[0] = sum / static_cast<double>(T);
    }
  };
  run({.dtype = c.real}, [&](Tape& tape) { logits = decoder.logits(tape, tokens); });
  logits = {};
  run({.dtype = c.real, .training = true},
      [&](Tape& tape) { loss = decoder.loss(tape, tokens, targets, 1 / static_cast<double>(T)); });
  for (const Param& p : decoder.params().all()) {
    kernels.copy(p.grad, c.result("grad/" + p.name, p.value.shape));
  }
}

const std::map<std::string, void (*)(Case&)> operations = {
    {"entmax", run_entmax}, {"full", run_full}, {"dash", run_dash}, {"model", run_model}};

struct Options {
  std::string operation, in, out, device = "cpu", dtype = "f64";
};

void run(const Options& options) {
  require(!std::filesystem::exists(options.out) ||
              !std::filesystem::equivalent(options.in, options.out),
          "--in and --out are the same file {}", options.in);
  const h5::File in = h5::File::open(options.in);
  const std::string partial = options.out + ".partial";
  h5::File out = h5::File::create(partial);
  const std::vector<std::string> groups = in.groups();
  require(!groups.empty(), "{} has no groups; each is a case with in/* tensors", options.in);
  for (const std::string& group : groups) {
    Case c(in, group, options.dtype == "f64" ? DType::f64 : DType::f32);
    operations.at(options.operation)(c);
    c.write(out);
  }
  out.close();
  std::filesystem::rename(partial, options.out);
}

}  // namespace

void add_op(CLI::App& app) {
  auto options = std::make_shared<Options>();
  CLI::App* op = app.add_subcommand("op", "Run one operation on tensors from an HDF5 file");
  std::vector<std::string> names;
  for (const auto& [name, f] : operations) names.push_back(name);
  op->add_option("operation", options->operation, "entmax, full, dash or model")
      ->required()
      ->check(CLI::IsMember(names));
  op->add_option("--in", options->in, "groups with in/* tensors and parameters as attributes")
      ->required();
  op->add_option("--out", options->out, "gets out/* and, where in/dout is given, grad/*")
      ->required();
  op->add_option("--device", options->device, "where to run")->check(CLI::IsMember({"cpu"}));
  op->add_option("--dtype", options->dtype,
                 "arithmetic: f64, the definition, or f32, what training uses")
      ->capture_default_str()
      ->check(CLI::IsMember({"f32", "f64"}));
  op->footer("Example: entrain op dash --in dash.h5 --out mine.h5");
  op->callback([options] { run(*options); });
}

}  // namespace entrain::cli
