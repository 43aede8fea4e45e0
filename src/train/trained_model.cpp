#include "train/trained_model.h"

#include <algorithm>

#include "train/device.h"

namespace entrain {

TrainedModel::TrainedModel(const std::string& path, const std::vector<std::string>& overrides,
                           bool verify_store)
    : checkpoint(path), info(read_info(path)), overrides_(overrides) {
  if (overridden("attention.target_density=")) {
    throw ConfigError(
        "attention.target_density moves gamma while training only; set attention.gamma here");
  }
  // What the run aimed at, a method without gamma would refuse.
  std::vector<std::string> all{"attention.target_density=0"};
  all.insert(all.end(), overrides.begin(), overrides.end());
  config = read_config(info.config_yaml, path, all);
  store = std::make_unique<TokenStore>(config.data.path, verify_store);
  require_tokenizer(path, info.data_fingerprint, *store);
  config.model.vocab = store->vocab();
}

std::unique_ptr<Decoder> TrainedModel::decoder(Device device, int64_t max_tokens,
                                               std::vector<std::string>& lacking) const {
  auto decoder = std::make_unique<Decoder>(config.model, config.attention, max_tokens, 0, false,
                                           device, choose_dtype(config.dtype, device));
  if (overridden("attention.")) {
    const Shared shared = load_shared(checkpoint, decoder->params());
    lacking = shared.adopted;
    lacking.insert(lacking.end(), shared.fresh.begin(), shared.fresh.end());
  } else {
    load_checkpoint(checkpoint, decoder->params());
  }
  const auto restore = [&](const std::string& name, double* knob) {
    const auto& left = info.state.controller;
    if (knob && !overridden("attention." + name + "=") && left.contains(name)) {
      *knob = left.at(name);
    }
  };
  restore("gamma", decoder->attention().gamma());
  restore("alpha", decoder->attention().alpha());
  return decoder;
}

bool TrainedModel::overridden(const std::string& key) const {
  return std::ranges::any_of(overrides_, [&](const std::string& o) { return o.starts_with(key); });
}

}  // namespace entrain
