#include "train/evaluate_run.h"

#include <optional>

#include "train/together.h"
#include "train/trained_model.h"

namespace entrain {

RunEvaluation evaluate_run(const std::string& run, const std::vector<std::string>& overrides,
                           Comm& comm) {
  RunEvaluation evaluation;
  auto& [path, config, info, lacking, result] = evaluation;
  std::optional<TrainedModel> model;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Evaluator> evaluator;
  TapeMemory memory(Device::cpu);
  together(comm, [&] {
    if (comm.rank() == 0) path = find_checkpoint(run);
  });
  broadcast(comm, path, 0);
  together(comm, [&] {
    model.emplace(path, overrides, true);
    config = model->config;
    info = model->info;
    require_sequence(*model->store, Split::validation, config.data.seq_len);
    decoder = model->decoder(config.data.seq_len, lacking);
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      evaluator = std::make_unique<Evaluator>(*decoder, memory, config.data.seq_len);
    }
  });
  result = evaluator->run(*model->store, Split::validation, config.eval.sequences, comm);
  return evaluation;
}

}  // namespace entrain
