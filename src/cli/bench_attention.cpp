// entrain bench attention: sparse attention next to full attention, forward and backward, in one
// run.
#include <nlohmann/json.hpp>

#include "attention/record_attention.h"
#include "cli/bench_layer.h"
#include "core/file.h"
#include "core/median.h"
#include "core/version.h"
#include "train/config.h"
#include "train/device.h"
#include "train/machine.h"

namespace entrain::cli {
namespace {

constexpr const char* form = "B1,Hq32,Hkv2,D128,N16384";

struct Options {
  std::string shape = "B1,Hq8,Hkv2,D64,N4096", device = "auto", against, json;
  std::vector<std::string> methods{"dash"};
  std::vector<double> densities{0.25, 0.125};
  AttentionConfig config;
  int64_t sharing = 64;
  int repeats = 7;
};

/// The engine of sparse attention over every block.
class EveryBlock : public AttentionMethod {
 public:
  explicit EveryBlock(int64_t block) : block_(block) {}

  Tensor record(Tape& tape, const AttentionInput& in, Var o) const override {
    const int64_t N = in.k.value[2], M = (N + block_ - 1) / block_;
    const Tensor mask = tape.keep({in.k.value[0], in.k.value[1], N, (M + 63) / 64}, DType::u64);
    record_attention(tape, in, {.block = block_, .mask = mask}, {}, o);
    return mask;
  }

  /// Sets the bits of all blocks up to each query's own.
  void fill(Tensor mask) const {
    Mirror mirror(mask);
    uint64_t* word = mirror.host().ptr<uint64_t>();
    const int64_t words = mask[3];
    for (int64_t i = 0; i < mask.numel(); ++i) {
      const int64_t query = i / words % mask[2], seen = query / block_ + 1 - i % words * 64;
      word[i] = seen >= 64 ? ~uint64_t{0} : seen > 0 ? (uint64_t{1} << seen) - 1 : 0;
    }
    mirror.upload();
  }

 private:
  int64_t block_;
};

struct Row {
  std::string method;
  Layer layer;
  int64_t block = 0;  // keys in one, of what has a mask
  std::vector<Layer::Times> times = {};
  std::vector<double> of_full = {};  // total
};
using Rows = std::vector<std::unique_ptr<Row>>;

Rows make_rows(const Options& options, const LayerInputs& in) {
  Rows rows;
  const auto add = [&](const char* name, std::unique_ptr<AttentionMethod> method,
                       int64_t block) -> Layer& {
    return rows.emplace_back(new Row{name, Layer(std::move(method), in), block})->layer;
  };
  AttentionConfig config = options.config;
  add("full", make_attention({.method = "full"}), 0);
  for (const std::string& method : options.methods) {
    config.method = method;
    if (method != "dash") {
      add(method.c_str(), make_attention(config), config.block);
      continue;
    }
    for (const double density : options.densities) {
      if (density < 1) {
        add("dash", make_attention(config), config.chunk).seek(density);
      } else {
        auto every_block = std::make_unique<EveryBlock>(config.chunk);
        const EveryBlock& engine = *every_block;
        engine.fill(add("engine", std::move(every_block), config.chunk).mask());
      }
    }
  }
  return rows;
}

/// Operations and bytes a second that this machine has.
struct Machine {
  std::string matmul_name;
  double matmul, memory;
};

/// Rows take turns, and the machine with them: noise meets all alike.
Machine measure(Rows& rows, int repeats, Device device) {
  MatmulRate matmul(device);
  MemoryRate memory(device);
  std::vector<double> matmuls, memories;
  for (int i = 0; i <= repeats; ++i) {
    double full = 0;
    for (const auto& row : rows) {
      const Layer::Times times = row->layer.run();
      if (row == rows.front()) full = times.total();
      if (i == 0) continue;  // warms up
      row->times.push_back(times);
      row->of_full.push_back(times.total() / full);
    }
    matmuls.push_back(matmul.measure());
    memories.push_back(memory.measure());
  }
  return {matmul.name(), median(matmuls), median(memories)};
}

/// Of products, forward and backward; not what backward computes again.
double operations(const AttentionSizes& s, double pairs) {
  return 12 * static_cast<double>(s.group() * s.D) * pairs;
}

/// Seconds that no method of so many pairs of queries and keys takes less than: of the operations
/// of products forward and backward, and of q, k, v, o and the four gradients moved once each in
/// either pass that needs them.
double least_seconds(const LayerInputs& in, double pairs, const Machine& machine) {
  const AttentionSizes& s = in.sizes;
  const auto elements = static_cast<double>(s.B * s.N * (s.Hq + s.Hkv) * s.D);
  const double bytes = 6 * elements * static_cast<double>(size_of(in.dtype()));
  return std::max(operations(s, pairs) / machine.matmul, bytes / machine.memory);
}

using Json = nlohmann::ordered_json;

/// Medians, of each time for itself. other: milliseconds of another program, or 0.
Json result(Row& row, const LayerInputs& in, const Machine& machine, double other) {
  const auto ms = [&](const auto& part) {
    std::vector<double> values;
    for (const Layer::Times& times : row.times) values.push_back(1e3 * part(times));
    return median(values);
  };
  const double forward = ms([](auto& t) { return t.attention.forward; });
  const double backward = ms([](auto& t) { return t.attention.backward; });
  const double total = ms([](auto& t) { return t.total(); });
  const ReadCounters::Read read = row.layer.read();
  Json out{{"method", row.method}, {"density", read.density()}};
  const int64_t tile = std::max<int64_t>(1, 64 / in.sizes.group());  // queries of 64 rows
  double factor = 1;
  if (const Tensor mask = row.layer.mask()) {
    out["union"] = factor = union_factor(mask, row.block, tile);
  }
  out["forward_ms"] = forward;
  out["backward_ms"] = backward;
  out["routing_forward_ms"] = ms([](auto& t) { return t.routing.forward; });
  out["routing_backward_ms"] = ms([](auto& t) { return t.routing.backward; });
  out["total_ms"] = total;
  out["of_full"] = median(row.of_full);
  out["tflops"] = operations(in.sizes, read.pairs) / (forward + backward) / 1e9;
  out["tile_gigabytes"] = factor * read.pairs / static_cast<double>(tile) *
                          static_cast<double>(2 * in.sizes.D) *
                          static_cast<double>(size_of(in.dtype())) / 1e9;
  out["of_roofline"] = 1e3 * least_seconds(in, read.pairs, machine) / total;
  if (other > 0) out["of_other"] = total / other;
  return out;
}

void print(const Json& results) {
  constexpr struct {
    const char *key, *title;
    int decimals;
  } columns[] = {{"density", "density", 4},
                 {"union", "union", 2},
                 {"forward_ms", "forward", 3},
                 {"backward_ms", "backward", 3},
                 {"routing_forward_ms", "routing", 3},
                 {"routing_backward_ms", "its back", 3},
                 {"total_ms", "total", 3},
                 {"of_full", "of full", 3},
                 {"tflops", "TFLOP/s", 3},
                 {"tile_gigabytes", "tiles GB", 3},
                 {"of_roofline", "roofline", 3},
                 {"of_other", "of other", 3}};
  const auto shown = [&](const char* key) {
    return std::ranges::any_of(results, [&](const Json& row) { return row.contains(key); });
  };
  fmt::print("{:<9}", "");
  for (const auto& column : columns) {
    if (shown(column.key)) fmt::print("{:>10}", column.title);
  }
  for (const Json& row : results) {
    fmt::print("\n{:<9}", row["method"].get<std::string>());
    for (const auto& [key, title, decimals] : columns) {
      if (!shown(key)) continue;
      const std::string value =
          row.contains(key) ? fmt::format("{:.{}f}", row[key].get<double>(), decimals) : "";
      fmt::print("{:>10}", value);
    }
  }
  fmt::print("\n");
}

/// Milliseconds forward and backward in what another program wrote about the same shape.
double read_other(const std::string& path, const std::string& shape) {
  try {
    const Json other = Json::parse(read_file(path));
    require(parse_shape(other.at("shape"), form) == parse_shape(shape, form),
            "{}: it is about {}, not {}", path, other.at("shape").get<std::string>(), shape);
    return other.at("forward_ms").get<double>() + other.at("backward_ms").get<double>();
  } catch (const Json::exception& error) {
    fail("{}: not the JSON of another program's times: {}", path, error.what());
  }
}

void bench_attention(const Options& options) {
  const AttentionSizes sizes = parse_shape(options.shape, form);
  const double other = options.against.empty() ? 0 : read_other(options.against, options.shape);
  const Device device = choose_device(options.device);
  const DType dtype = choose_dtype("auto", device);
  const LayerInputs in(sizes, TopicInputs(sizes, options.config.chunk, options.sharing), device,
                       dtype);
  Rows rows = make_rows(options, in);
  const Machine machine = measure(rows, options.repeats, device);
  Json results;
  for (const auto& row : rows) results.push_back(result(*row, in, machine, other));

  fmt::print(
      "attention: {}, {} {}, chunk {}, runs of {} queries; milliseconds, medians of {}\n"
      "  union     blocks that the queries of a tile of 64 rows attend together, per block of one\n"
      "  of full   total time, routing included, of full attention's beside it\n"
      "  TFLOP/s   12 D a head and attended pair of query and key, over forward and backward\n"
      "  tiles GB  keys and values that tiles load in a pass: pairs x union / queries of a tile\n"
      "  roofline  least time, by these operations or by q, k, v, o and gradients moved once a "
      "pass,\n            of the total\n",
      options.shape, where(device), name_of(dtype), options.config.chunk, options.sharing,
      options.repeats);
  print(results);
  fmt::print("{}: {:.3f} TFLOP/s; memory: {:.0f} GB/s\n", machine.matmul_name,
             machine.matmul / 1e12, machine.memory / 1e9);
  if (options.json.empty()) return;
  Json out{{"shape", options.shape},
           {"chunk", options.config.chunk},
           {"sharing", options.sharing},
           {"repeats", options.repeats},
           {"device", where(device)},
           {"dtype", name_of(dtype)},
           {"matmul_tflops", machine.matmul / 1e12},
           {"memory_gigabytes_per_second", machine.memory / 1e9},
           {"commit", code_version()},
           {"rows", results}};
  replace_file(options.json, out.dump(1) + "\n");
}

}  // namespace

void add_bench_attention(CLI::App& bench) {
  auto o = std::make_shared<Options>();
  CLI::App* attention =
      bench.add_subcommand("attention", "Sparse attention against full attention");
  attention->add_option("--shape", o->shape, "sequences, heads, head_dim and tokens")
      ->capture_default_str();
  attention->add_option("--method", o->methods, "one or more beside full")
      ->capture_default_str()
      ->check(CLI::IsMember({"dash", "nsa", "infllmv2"}));
  attention
      ->add_option("--density", o->densities,
                   "one or more of dash, reached by gamma; 1: the engine over every block")
      ->capture_default_str()
      ->check(CLI::Range(0.001, 1.0));
  attention->add_option("--chunk", o->config.chunk, "tokens in a chunk of dash")
      ->capture_default_str()
      ->check(CLI::Range(1, 1 << 20));
  attention->add_option("--topk", o->config.topk, "blocks of a query of nsa and infllmv2")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  attention->add_option("--window", o->config.window, "last tokens that nsa attends")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  attention
      ->add_option(
          "--sharing", o->sharing,
          "neighbouring queries that look for the same: a run of them shares five directions, "
          "to which each adds noise of its own, half as large as one; 1: each for itself, "
          "the worst case")
      ->capture_default_str()
      ->check(CLI::PositiveNumber);
  attention->add_option("--against", o->against,
                        "another program's times, as tools/baselines/attention.py prints them");
  attention->add_option("--json", o->json, "also write the results to this file");
  add_device(*attention, o->device);
  attention->add_option("--repeats", o->repeats)->capture_default_str()->check(CLI::PositiveNumber);
  attention->callback([o] { bench_attention(*o); });
}

}  // namespace entrain::cli
