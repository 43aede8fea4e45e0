#include "train/evaluate_run.h"

#include <optional>

#include "train/together.h"

namespace entrain {

TrainedModel open_run(const std::string& run, const std::vector<std::string>& overrides,
                      Comm& comm) {
  std::string checkpoint;
  together(comm, [&] {
    if (comm.rank() == 0) checkpoint = find_checkpoint(run);
  });
  broadcast(comm, checkpoint, 0);
  std::optional<TrainedModel> model;
  together(comm, [&] {
    model.emplace(checkpoint, overrides, true);
    require_sequence(*model->store, Split::validation, model->config.data.seq_len);
  });
  return std::move(*model);
}

RunEvaluation evaluate_run(const TrainedModel& model, Comm& comm) {
  RunEvaluation evaluation{model.checkpoint, model.config, model.info, {}, {}};
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Evaluator> evaluator;
  TapeMemory memory(comm.device());
  together(comm, [&] {
    const int64_t seq_len = model.config.data.seq_len;
    decoder = model.decoder(comm.device(), seq_len, evaluation.lacking);
    for (const bool committed : {false, true}) {
      if (committed) memory.commit();
      evaluator = std::make_unique<Evaluator>(*decoder, memory, seq_len);
    }
  });
  evaluation.result =
      evaluator->run(*model.store, Split::validation, model.config.eval.sequences, comm);
  return evaluation;
}

}  // namespace entrain
