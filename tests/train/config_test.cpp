#include "train/config.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>

#include "core/file.h"
#include "train/config_keys.h"

namespace entrain {
namespace {

const char* const small = R"(model:
  {n_layer: 4, d_model: 256, n_head: 8, n_kv_head: 2, head_dim: 32, d_ff: 704}
attention: {method: dash, chunk: 16}
data: {path: tokens.h5, seq_len: 1024}
train:
  steps: 100
  global_batch: 8
  micro_batch: 4
run: {dir: runs/small}
)";

std::string message_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

std::string parse_error(const std::string& yaml) {
  return message_of([&] { parse_config(yaml, "x.yaml"); });
}

// A file in the tests' folder; loading names it by its path.
class LoadConfig : public testing::Test {
 protected:
  std::string write(const std::string& yaml) {
    replace_file(path_, yaml);
    return path_;
  }

  // What loading says, with the path cut down to x.yaml.
  std::string error(const std::string& yaml, const std::vector<std::string>& overrides = {}) {
    std::string text = message_of([&] { load_config(write(yaml), overrides); });
    const size_t at = text.find(path_);
    return at == text.npos ? text : text.replace(at, path_.size(), "x.yaml");
  }

  std::string override_error(const std::string& override) { return error(small, {override}); }

  RunConfig load(const std::vector<std::string>& overrides) {
    return load_config(write(small), overrides);
  }

 private:
  std::string path_ = testing::TempDir() + "config_test_" +
                      testing::UnitTest::GetInstance()->current_test_info()->name() + ".yaml";
};

TEST_F(LoadConfig, ReadsWhatIsGivenAndKeepsTheDefaults) {
  const RunConfig config = load({});
  EXPECT_EQ(config.model.n_kv_head, 2);
  EXPECT_EQ(config.attention.method, "dash");
  EXPECT_EQ(config.attention.chunk, 16);
  EXPECT_EQ(config.attention.alpha, 1.5);
  EXPECT_EQ(config.data.path, "tokens.h5");
  EXPECT_EQ(config.train.steps, 100);
  EXPECT_EQ(config.train.optim, OptimConfig());
  EXPECT_EQ(config.checkpoint, CheckpointConfig());
  EXPECT_EQ(config.dir, "runs/small");
}

TEST_F(LoadConfig, OverridesWinAndTheLastOneOfThem) {
  const RunConfig config =
      load({"train.lr=1e-2", "train.lr=+2.0e-3", "train.steps=1e3", "attention.center=false",
            "data.path=a=b.h5", "train.seed=18446744073709551615", "train.init_from="});
  EXPECT_EQ(config.train.optim.lr, 2.0e-3);
  EXPECT_EQ(config.train.steps, 1000);
  EXPECT_FALSE(config.attention.center);
  EXPECT_EQ(config.data.path, "a=b.h5");
  EXPECT_EQ(config.train.seed, UINT64_MAX);
}

TEST_F(LoadConfig, AnOverrideMaySupplyARequiredKey) {
  const std::string yaml = std::string(small).substr(0, std::string(small).find("run:"));
  EXPECT_EQ(error(yaml), "x.yaml: missing run.dir");
  EXPECT_EQ(load_config(write(yaml), {"run.dir=runs/a"}).dir, "runs/a");
}

TEST_F(LoadConfig, RefusesBadOverrides) {
  EXPECT_EQ(override_error("train.lr"),
            "command line: 'train.lr' is not of the form section.key=value");
  EXPECT_EQ(override_error("train.learning_rate=1"),
            "command line: unknown key train.learning_rate; did you mean train.lr?");
  EXPECT_EQ(override_error("lr=1"), "command line: unknown key lr; did you mean train.lr?");
  EXPECT_EQ(override_error("trian.steps=1"),
            "command line: unknown key trian.steps; did you mean train.steps?");
  EXPECT_EQ(override_error("=1").substr(0, 26), "command line: unknown key ");
  EXPECT_EQ(override_error("train.steps="),
            "command line: train.steps must be a whole number, not ''");
  EXPECT_EQ(override_error("train.lr=-1"), "command line: train.lr must be greater than 0, not -1");
}

TEST_F(LoadConfig, NamesTheLineOfAnImpossibleValue) {
  std::string yaml = small;
  yaml.replace(yaml.find("micro_batch: 4"), 14, "micro_batch: 9");
  EXPECT_EQ(error(yaml), "x.yaml:8: train.micro_batch 9 must be at most train.global_batch 8");
  EXPECT_EQ(error(small, {"train.steps=5", "train.warmup=5"}),
            "command line: train.warmup 5 must be less than train.steps 5");
}

TEST_F(LoadConfig, NamesAFileThatCannotBeRead) {
  EXPECT_EQ(message_of([] { load_config("no/run.yaml", {}); }),
            "cannot read no/run.yaml: No such file or directory");
  EXPECT_EQ(message_of([] { load_config("/usr", {}); }), "cannot read /usr: it is a folder");
}

TEST_F(LoadConfig, AcceptsEveryFileInConfigs) {
  int count = 0;
  for (const auto& file : std::filesystem::directory_iterator(CONFIGS)) {
    EXPECT_EQ(message_of([&] { load_config(file.path(), {}); }), "no error");
    ++count;
  }
  EXPECT_GE(count, 6);
}

TEST(ParseConfig, SuggestsTheNearestKey) {
  const auto unknown = [](const std::string& section, const std::string& key) {
    return parse_error(section + ":\n  " + key + ": 1\n");
  };
  EXPECT_EQ(unknown("attention", "chunks"),
            "x.yaml:2: unknown key attention.chunks; did you mean attention.chunk?");
  EXPECT_EQ(unknown("model", "num_layers"),
            "x.yaml:2: unknown key model.num_layers; did you mean model.n_layer?");
  EXPECT_EQ(unknown("train", "warmup_steps"),
            "x.yaml:2: unknown key train.warmup_steps; did you mean train.warmup?");
  EXPECT_EQ(unknown("train", "seq_len"),
            "x.yaml:2: unknown key train.seq_len; did you mean data.seq_len?");
  EXPECT_EQ(unknown("train", "every"),
            "x.yaml:2: unknown key train.every; did you mean eval.every?");
  EXPECT_EQ(unknown("chekpoint", "every"),
            "x.yaml:1: unknown section chekpoint; did you mean checkpoint?");
  EXPECT_EQ(unknown("eval", "temperature"),
            "x.yaml:2: unknown key eval.temperature; "
            "eval has every, sequences");
  EXPECT_EQ(unknown("optimizer", "lr"),
            "x.yaml:1: unknown section optimizer; "
            "sections are model, attention, data, train, checkpoint, eval, run");
  EXPECT_EQ(parse_error("learning_rate: 1\n"),
            "x.yaml:1: unknown key learning_rate; did you mean train.lr?");
  EXPECT_EQ(parse_error("\n# a comment\ntrain.lr: 1\n"),
            "x.yaml:3: write train.lr as lr inside the section train:");
}

TEST(ParseConfig, RefusesWrongTypes) {
  const auto line = [](const std::string& key, const std::string& value) {
    const size_t dot = key.find('.');
    return parse_error(key.substr(0, dot) + ":\n\n  " + key.substr(dot + 1) + ": " + value + "\n");
  };
  EXPECT_EQ(line("model.n_layer", "abc"),
            "x.yaml:3: model.n_layer must be a whole number, not 'abc'");
  EXPECT_EQ(line("model.n_layer", "1.5"),
            "x.yaml:3: model.n_layer must be a whole number, not '1.5'");
  EXPECT_EQ(line("model.n_layer", "8x"),
            "x.yaml:3: model.n_layer must be a whole number, not '8x'");
  EXPECT_EQ(line("model.n_layer", "2147483648"),
            "x.yaml:3: model.n_layer must be from -2147483648 to 2147483647, not '2147483648'");
  EXPECT_EQ(line("train.steps", "9223372036854775808"),
            "x.yaml:3: train.steps must be from -9223372036854775808 to 9223372036854775807, "
            "not '9223372036854775808'");
  EXPECT_EQ(line("train.seed", "-1"),
            "x.yaml:3: train.seed must be from 0 to 18446744073709551615, not '-1'");
  EXPECT_EQ(line("train.lr", "fast"), "x.yaml:3: train.lr must be a finite number, not 'fast'");
  for (const char* value : {".nan", "nan", ".inf", "inf", "-inf", "1e999", "0x10", "1_000", "''"}) {
    EXPECT_TRUE(line("train.lr", value).starts_with("x.yaml:3: train.lr must be a finite number"))
        << value;
  }
  EXPECT_EQ(line("attention.center", "yes"),
            "x.yaml:3: attention.center must be true or false, not 'yes'");
  EXPECT_EQ(line("train.lr", "[1, 2]"), "x.yaml:3: train.lr must be one value, not a list");
  EXPECT_EQ(line("train.lr", "{a: 1}"), "x.yaml:3: train.lr must be one value, not a map");
  EXPECT_EQ(line("train.lr", ""), "x.yaml:3: train.lr has no value");
  EXPECT_EQ(line("train.lr", "|\n    two\n    lines"),
            "x.yaml:3: train.lr must be a finite number, not 'two...'");
}

TEST(ParseConfig, RefusesWhatIsNoMapOfSections) {
  EXPECT_EQ(parse_error(""), "x.yaml is empty; it needs the sections model, data, train and run");
  EXPECT_EQ(parse_error("# only a comment\n"), parse_error(""));
  EXPECT_EQ(parse_error("\n- a\n- b\n"),
            "x.yaml:2: must be a map of the sections model, data, train and run, not a list");
  EXPECT_EQ(parse_error("hello\n"),
            "x.yaml:1: must be a map of the sections model, data, train and run, not a value");
  EXPECT_EQ(parse_error("model: 3\n"), "x.yaml:1: model must be a section of keys, not a value");
  EXPECT_EQ(parse_error("train: [1]\n"), "x.yaml:1: train must be a section of keys, not a list");
  EXPECT_EQ(parse_error("{[a]: 1}\n"), "x.yaml:1: a key must be a word, not a list");
  EXPECT_EQ(parse_error("model: {}\n---\nmodel: {}\n").substr(0, 35),
            "x.yaml:3: a second YAML document st");
}

TEST(ParseConfig, RefusesDuplicates) {
  EXPECT_EQ(parse_error("train:\n  lr: 1\n  steps: 2\n  lr: 1\n"),
            "x.yaml:4: train.lr is given twice, first at x.yaml:2");
  EXPECT_EQ(parse_error("eval: {every: 1}\nrun: {dir: a}\neval: {every: 1}\n"),
            "x.yaml:3: eval is given twice, first at x.yaml:1");
}

TEST(ParseConfig, TurnsSyntaxErrorsIntoOneLine) {
  for (const char* yaml : {"a: 1\nmodel: {n_layer: 4\n", "a: 1\n b: 2\n", "a: b: c\n",
                           "a: *nowhere\n", "a: \"\\q\"\n", "\t- x\n"}) {
    const std::string text = parse_error(yaml);
    EXPECT_TRUE(text.starts_with("x.yaml:")) << text;
    EXPECT_NE(text.find(": not valid YAML: "), text.npos) << text;
    EXPECT_GE(text[7], '1') << text;
    EXPECT_EQ(text.find('\n'), text.npos) << text;
  }
}

TEST(ParseConfig, ListsWhatIsMissing) {
  EXPECT_EQ(parse_error("model: {n_layer: 2}\nattention:\n"),
            "x.yaml: missing model.d_model, model.n_head, model.n_kv_head, model.head_dim, "
            "model.d_ff, data.path, data.seq_len, train.steps, train.global_batch, "
            "train.micro_batch, run.dir");
}

TEST(ToYaml, RoundTripsEveryKey) {
  RunConfig config;
  double real = 0.1;
  int whole = 3;
  for (const Key& key : keys_of(config)) {
    std::visit(
        [&](auto* to) {
          using T = std::remove_pointer_t<decltype(to)>;
          if constexpr (std::is_same_v<T, double>) {
            *to = real = std::nextafter(real * -3.7e5, 1.0);
          } else if constexpr (std::is_same_v<T, bool>) {
            *to = !*to;
          } else if constexpr (std::is_same_v<T, std::string>) {
            *to = "a/" + std::to_string(++whole);
          } else {
            *to = std::numeric_limits<T>::max() - static_cast<T>(++whole);
          }
        },
        key.field);
  }
  EXPECT_EQ(parse_config(to_yaml(config), "config.yaml"), config) << to_yaml(config);
  EXPECT_EQ(parse_config(to_yaml(RunConfig()), "config.yaml"), RunConfig());
}

TEST(ToYaml, RoundTripsHardValues) {
  RunConfig config = parse_config(small, "x.yaml");
  for (const double value : {0.1, 1.0 / 3.0, 1e6, 1e-8, 1e300, 5e-324, -0.0, 1e22, 123456789.125}) {
    config.train.optim.lr = value;
    const double read = parse_config(to_yaml(config), "x.yaml").train.optim.lr;
    EXPECT_EQ(std::signbit(read), std::signbit(value));
    EXPECT_EQ(read, value);
  }
  for (const char* text : {"",   "null", "~",    "true", "12",  "a b", " a ",  "a: b", "# a",
                           "'",  "\"",   "a\nb", "-",    "- a", "{a}", "[a",   "&a",   "*a",
                           "!a", "é",    "\\t",  "a #b", "%a",  "@a",  "a\tb", "..",   "---"}) {
    config.data.path = text;
    EXPECT_EQ(parse_config(to_yaml(config), "x.yaml").data.path, text) << to_yaml(config);
  }
}

TEST(DescribeKeys, HasOneLineForEachKey) {
  RunConfig config;
  const std::string table = describe_keys();
  EXPECT_EQ(std::ranges::count(table, '\n'), std::ssize(keys_of(config)));
  EXPECT_NE(table.find("train.lr                  0.0003"), table.npos) << table;
  EXPECT_NE(table.find("run.dir                   required"), table.npos) << table;
}

class Check : public testing::Test {
 protected:
  // What check() says of the small configuration after a change.
  std::string with(const std::function<void(RunConfig&)>& change) {
    RunConfig config = parse_config(small, "x.yaml");
    change(config);
    return message_of([&] { check(config); });
  }

  // The same with one key set.
  std::string with(const std::string& name, const std::string& value) {
    return with([&](RunConfig& config) {
      const std::vector<Key> keys = keys_of(config);
      ASSERT_EQ(assign(find_key(keys, name)->field, value), "");
    });
  }
};

TEST_F(Check, AcceptsTheSmallConfiguration) {
  EXPECT_EQ(with([](RunConfig&) {}), "no error");
}

TEST_F(Check, NamesTheNearestDivisibleValues) {
  EXPECT_EQ(with("model.n_kv_head", "3"),
            "model.n_kv_head 3 does not divide model.n_head 8; nearest that do: 2 or 4");
  EXPECT_EQ(with("model.n_kv_head", "16"),
            "model.n_kv_head 16 does not divide model.n_head 8; nearest that do: 8");
  EXPECT_EQ(with("model.d_model", "250"),
            "model.d_model 250 is not divisible by model.n_head 8; nearest that are: 248 or 256");
  EXPECT_EQ(with("model.head_dim", "33"),
            "model.head_dim 33 is odd and rotary embedding turns "
            "pairs; nearest that are even: 32 or 34");
  EXPECT_EQ(with("model.head_dim", "258"), "model.head_dim must be at most 256, not 258");
  EXPECT_EQ(with("model.d_model", "512"), "no error");  // need not be n_head * head_dim
}

TEST_F(Check, RefusesValuesOutOfRange) {
  const std::pair<const char*, std::vector<const char*>> refused[] = {
      {"model.n_layer", {"0", "-1"}},
      {"model.d_model", {"0"}},
      {"model.n_head", {"0"}},
      {"model.n_kv_head", {"0"}},
      {"model.head_dim", {"0"}},
      {"model.d_ff", {"0"}},
      {"model.rope_theta", {"0"}},
      {"model.norm_eps", {"0"}},
      {"attention.method", {"flash", "", "nas"}},
      {"attention.chunk", {"0"}},
      {"attention.alpha", {"0.99", "2.01"}},
      {"attention.gamma", {"0", "-1", "1e7"}},
      {"attention.sigma", {"0"}},
      {"attention.alpha_start", {"0.99", "2.01"}},
      {"attention.alpha_steps", {"-1"}},
      {"attention.gamma_start", {"0", "1e7"}},
      {"attention.gamma_steps", {"-1"}},
      {"attention.summaries", {"max", ""}},
      {"attention.aggregation", {"mean"}},
      {"attention.prior_eps", {"-1e-9"}},
      {"attention.init_blocks", {"-1"}},
      {"attention.local_blocks", {"0"}},
      {"attention.block", {"0"}},
      {"attention.topk", {"0"}},
      {"attention.l", {"0"}},
      {"attention.d", {"0"}},
      {"attention.target_density", {"-0.1", "1.1"}},
      {"data.path", {""}},
      {"data.seq_len", {"1"}},
      {"data.skip", {"-1"}},
      {"train.steps", {"0"}},
      {"train.global_batch", {"0", "3"}},
      {"train.micro_batch", {"0", "9"}},
      {"train.lr", {"0"}},
      {"train.warmup", {"-1", "100"}},
      {"train.schedule", {"cosin"}},
      {"train.min_lr", {"-1", "1"}},
      {"train.beta1", {"-0.1", "1"}},
      {"train.beta2", {"-0.1", "1"}},
      {"train.eps", {"0"}},
      {"train.weight_decay", {"-1"}},
      {"train.clip", {"-1"}},
      {"train.init_from", {"runs/../runs/small"}},
      {"attention.window", {"0"}},
      {"train.log_every", {"0"}},
      {"checkpoint.every", {"-1"}},
      {"checkpoint.keep", {"-1"}},
      {"eval.every", {"-1"}},
      {"eval.sequences", {"0"}},
      {"run.dir", {""}},
  };
  for (const auto& [name, values] : refused) {
    for (const char* value : values) {
      const std::string text = with(name, value);
      EXPECT_NE(text, "no error") << name << " = " << value;
      EXPECT_EQ(text.find('\n'), text.npos);
    }
  }
  EXPECT_EQ(with("train.schedule", "cosin"),
            "train.schedule must be cosine or linear or constant, not 'cosin'");
  EXPECT_EQ(with("attention.method", "nas"),
            "attention.method must be full or dash or nsa or infllmv2, not 'nas'");
}

TEST_F(Check, AcceptsTheEndsOfRanges) {
  for (const auto& [name, value] :
       std::initializer_list<std::pair<const char*, const char*>>{{"attention.alpha", "1"},
                                                                  {"attention.alpha", "2"},
                                                                  {"attention.chunk", "1"},
                                                                  {"attention.chunk", "5000"},
                                                                  {"attention.target_density", "1"},
                                                                  {"attention.prior_eps", "0"},
                                                                  {"train.warmup", "99"},
                                                                  {"train.micro_batch", "8"},
                                                                  {"train.clip", "0"},
                                                                  {"train.beta1", "0"},
                                                                  {"checkpoint.every", "0"},
                                                                  {"checkpoint.keep", "0"},
                                                                  {"model.head_dim", "256"}}) {
    EXPECT_EQ(with(name, value), "no error") << name << " = " << value;
  }
}

TEST_F(Check, RefusesATargetBelowTheFloorAndItsAdviceWorks) {
  // Groups of 4 heads and the own chunk: (4 + 1) * 16 / 512.
  EXPECT_EQ(with("attention.target_density", "0.15625"), "no error");
  EXPECT_EQ(with("attention.target_density", "0.125"),
            "attention.target_density 0.125 is below the floor of about 0.157; "
            "take attention.chunk 12 or less, or take data.seq_len 1280 or more");
  const auto low = [&](int chunk, int seq_len, int init_blocks) {
    return with([&](RunConfig& c) {
      c.attention.target_density = 0.125;
      c.attention.chunk = chunk;
      c.attention.init_blocks = init_blocks;
      c.data.seq_len = seq_len;
    });
  };
  EXPECT_EQ(low(12, 1024, 0), "no error");
  EXPECT_NE(low(13, 1024, 0), "no error");
  EXPECT_EQ(low(16, 1280, 0), "no error");
  EXPECT_NE(low(16, 1279, 0), "no error");
  EXPECT_NE(low(12, 1024, 1), "no error");
}

TEST_F(Check, TopkHoldsTheForcedBlocks) {
  const auto forced = [&](const char* method, int topk) {
    return with([&](RunConfig& c) {
      c.attention.method = method;
      c.attention.topk = topk;
      c.attention.init_blocks = 1;
      c.attention.local_blocks = 2;
    });
  };
  EXPECT_EQ(forced("infllmv2", 2),
            "attention.topk 2 is less than the forced blocks, attention.init_blocks 1 and "
            "attention.local_blocks 2; take 3 or more");
  EXPECT_EQ(forced("infllmv2", 3), "no error");
  EXPECT_NE(forced("nsa", 2), "no error");
  EXPECT_EQ(forced("nsa", 3), "no error");
  EXPECT_EQ(forced("dash", 2), "no error");  // has no topk
}

TEST_F(Check, NsaNeedsWholeStrides) {
  const auto strides = [&](const char* method, int l, int d, int block) {
    return with([&](RunConfig& c) {
      c.attention.method = method;
      c.attention.l = l;
      c.attention.d = d;
      c.attention.block = block;
    });
  };
  EXPECT_EQ(strides("nsa", 32, 16, 64), "no error");
  EXPECT_EQ(
      strides("nsa", 40, 16, 64),
      "attention.l 40 is not a multiple of attention.d 16, as NSA's scores need; nearest that "
      "are: 32 or 48");
  EXPECT_EQ(strides("nsa", 32, 16, 72),
            "attention.block 72 is not a multiple of attention.d 16, as NSA's scores need; nearest "
            "that are: 64 or 80");
  EXPECT_EQ(strides("infllmv2", 40, 16, 72), "no error");
  EXPECT_EQ(with("attention.compression", "mpl"),
            "attention.compression must be mlp or linear or mean, not 'mpl'");
}

TEST_F(Check, TargetDensityNeedsASparseMethod) {
  EXPECT_EQ(
      with([](RunConfig& c) {
        c.attention.method = "full";
        c.attention.target_density = 0.5;
      }),
      "attention.target_density needs attention.method dash: full attention has no gamma to drive");
  EXPECT_EQ(
      with([](RunConfig& c) {
        c.attention.alpha = 1.0;
        c.attention.target_density = 0.5;
      }),
      "attention.target_density needs attention.alpha above 1: softmax routes to every chunk");
  EXPECT_EQ(with([](RunConfig& c) {
              c.attention.method = "dash";
              c.attention.alpha_steps = 10;
              c.attention.target_density = 0.5;
            }),
            "attention.target_density needs attention.alpha_start above 1: softmax routes to every "
            "chunk");
  EXPECT_EQ(
      with([](RunConfig& c) {
        c.attention.method = "dash";
        c.attention.gamma_steps = 10;
        c.attention.target_density = 0.5;
      }),
      "attention.gamma_steps and attention.target_density both drive gamma; take one of them");
}

}  // namespace
}  // namespace entrain
