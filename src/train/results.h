#pragma once
// The results of a study, STUDY.DIR/results.h5 and results.csv. Layout (h5ls explains it):
//   root attributes: format, protocol, code_version, study (YAML)
//   /runs/NAME attributes: varied (JSON), config (YAML) and the values of result.h
//   /runs/NAME/eval: loss_by_position [P, 3] (begin, end, loss), density, router_density and
//     active_blocks [n_layer, n_kv_head], routing [P, 5] (begin, end, candidates, entropy,
//     softmax_entropy) where measured
//   /runs/NAME/training: step, loss, density, tokens_per_second [S]
// All datasets are f64. The CSV has a line a run: its values and `varied`.
#include "train/study.h"

namespace entrain {

/// Makes both files say what the result.json of all runs in STUDY.DIR/runs say, the study's own
/// first; a file that does so already stays as it is. Each is written beside, flushed and renamed.
/// Throws Error; the old files are then still there.
void write_results(const Study& study);

}  // namespace entrain
