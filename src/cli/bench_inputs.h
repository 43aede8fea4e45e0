#pragma once
// Inputs on which routing has something to find, of any size in little time.
//
// Each chunk of keys is about one of a few topics, directions of its kv head; each run of
// neighbouring queries looks for a few of them:
//
//   k = topic(chunk) + 0.7 own(chunk) + 0.6 noise(token)
//   q = sum of w(run, head) topic over 4 topics of the run + 0.7 own(run) + 0.5 noise(token, head)
//
// with topics, own and noise normal and w uniform in [0, 1). Heads of a group look for the same
// topics with weights of their own. A run is `sharing` queries: neighbours choose alike as far as
// their noise lets them, and with runs of one query not at all.
#include <vector>

#include "cli/bench.h"

namespace entrain::cli {

class TopicInputs {
 public:
  TopicInputs(const AttentionSizes& sizes, int64_t chunk, int64_t sharing);

  /// Write a row of D numbers. The token may be any, whatever N is.
  void query(int64_t b, int64_t head, int64_t token, float* to) const;
  void key(int64_t b, int64_t kv_head, int64_t token, float* to) const;
  /// Normal numbers: values, gradients. `kind` keeps rows apart that share the other numbers.
  void noise(int kind, int64_t b, int64_t head, int64_t token, float* to) const;

 private:
  struct Row;
  const float* normals(const Row& row) const;

  AttentionSizes sizes_;
  int64_t chunk_, sharing_;
  std::vector<float> table_;
};

}  // namespace entrain::cli
