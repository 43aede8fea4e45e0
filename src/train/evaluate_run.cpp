#include "train/evaluate_run.h"

#include <optional>

#include "train/together.h"
#include "train/trained_model.h"

namespace entrain {

RunEvaluation evaluate_run(const std::string& run, const std::vector<std::string>& overrides,
                           Comm& comm) {
  RunEvaluation evaluation;
  std::optional<TrainedModel> model;
  std::unique_ptr<Decoder> decoder;
  std::unique_ptr<Evaluator> evaluator;
  std::optional<TapeMemory> memory;
  together(comm, [&] {
    if (comm.rank() == 0) evaluation.checkpoint = find_checkpoint(run);
  });
  broadcast(comm, evaluation.checkpoint, 0);
  together(comm, [&] {
    model.emplace(evaluation.checkpoint, overrides, true);
    const int64_t seq_len = model->config.data.seq_len;
    require_sequence(*model->store, Split::validation, seq_len);
    decoder = model->decoder(seq_len, evaluation.lacking);
    memory.emplace(decoder->device());
    for (const bool committed : {false, true}) {
      if (committed) memory->commit();
      evaluator = std::make_unique<Evaluator>(*decoder, *memory, seq_len);
    }
  });
  evaluation.config = model->config;
  evaluation.info = model->info;
  evaluation.result =
      evaluator->run(*model->store, Split::validation, model->config.eval.sequences, comm);
  return evaluation;
}

}  // namespace entrain
