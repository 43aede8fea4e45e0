#pragma once
// A model as a checkpoint has it, or under another attention: what evaluation and generation load.
#include <memory>
#include <string>
#include <vector>

#include "data/token_store.h"
#include "model/decoder.h"
#include "train/checkpoint.h"
#include "train/config.h"

namespace entrain {

class TrainedModel {
 public:
  /// Opens a checkpoint, the configuration it was trained with, overrides "section.key=value"
  /// applied, and the token store that this names; verify_store: reads all its tokens once. Throws
  /// Error, also when the store's tokenizer is another than the checkpoint's.
  TrainedModel(const std::string& checkpoint, const std::vector<std::string>& overrides,
               bool verify_store);

  /// The decoder for sequences of up to so many tokens, without gradients, with gamma and alpha as
  /// training left them unless they were overridden. Another attention takes the parameters that it
  /// shares with the checkpoint's; `lacking` gets the names of the others.
  std::unique_ptr<Decoder> decoder(Device device, int64_t max_tokens,
                                   std::vector<std::string>& lacking) const;

  std::string checkpoint;
  RunConfig config;
  CheckpointInfo info;
  std::unique_ptr<TokenStore> store;

 private:
  bool overridden(const std::string& key) const;

  std::vector<std::string> overrides_;
};

}  // namespace entrain
