#include "train/evaluate_run.h"

#include <algorithm>
#include <memory>

#include "train/together.h"

namespace entrain {
namespace {

/// Whether an override sets a key, or any key of a "section.".
bool sets(const std::vector<std::string>& overrides, const std::string& key) {
  return std::ranges::any_of(overrides, [&](const std::string& o) { return o.starts_with(key); });
}

}  // namespace

RunEvaluation evaluate_run(const std::string& run, const std::vector<std::string>& overrides,
                           Comm& comm) {
  RunEvaluation evaluation;
  auto& [path, config, info, fresh, result] = evaluation;
  std::unique_ptr<TokenStore> store;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Evaluator> evaluator;
  TapeMemory memory(Device::cpu);
  together(comm, [&] {
    if (comm.rank() == 0) path = find_checkpoint(run);
  });
  broadcast(comm, path, 0);
  together(comm, [&] {
    info = read_info(path);
    // Gamma stays as it is, and a method without one has no density to aim at.
    std::vector<std::string> all{"attention.target_density=0"};
    all.insert(all.end(), overrides.begin(), overrides.end());
    config = read_config(info.config_yaml, path, all);
    store = std::make_unique<TokenStore>(config.data.path);
    require_tokenizer(path, info.data_fingerprint, *store);
    require_sequence(*store, Split::validation, config.data.seq_len);
    config.model.vocab = store->vocab();
    decoder = std::make_unique<Decoder>(config.model, config.attention, config.data.seq_len, 0,
                                        false, Device::cpu);
    if (sets(overrides, "attention.")) {
      fresh = load_shared(path, decoder->params()).fresh;
    } else {
      load_checkpoint(path, decoder->params());
    }
    // Gamma and alpha as training left them, unless the user asks for others.
    const auto restore = [&](const char* name, double* knob) {
      const auto& left = info.state.controller;
      const bool given = sets(overrides, fmt::format("attention.{}=", name));
      if (knob && !given && left.contains(name)) *knob = left.at(name);
    };
    restore("gamma", decoder->attention().gamma());
    restore("alpha", decoder->attention().alpha());
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      evaluator = std::make_unique<Evaluator>(*decoder, memory, config.data.seq_len);
    }
  });
  result = evaluator->run(*store, Split::validation, config.eval.sequences, comm);
  return evaluation;
}

}  // namespace entrain
