#include "cli/bench_inputs.h"

#include <algorithm>

#include "core/rng.h"

namespace entrain::cli {
namespace {

constexpr uint64_t topics = 64;
constexpr int topics_in_a_run = 4;

/// Of rows, and of draws; those of noise() are below.
enum Kind : int {
  of_topic = 100,
  of_chunk,
  of_key,
  of_run,
  of_query,
  topic_of_chunk,
  topics_of_run,
  weights_of_run
};

}  // namespace

/// What a row belongs to. Its numbers depend on nothing else, so rows may be written in any order.
struct TopicInputs::Row {
  int kind;
  int64_t b, head, place;

  Rng rng() const {
    const auto stream = static_cast<uint64_t>((b << 20 | head) << 8 | kind);
    return Rng(static_cast<uint64_t>(place), stream);
  }
};

/// Rows are cut from one table of normal numbers, at places drawn for each: drawing every number
/// would take minutes where these inputs take seconds.
TopicInputs::TopicInputs(const AttentionSizes& sizes, int64_t chunk, int64_t sharing)
    : sizes_(sizes),
      chunk_(chunk),
      sharing_(sharing),
      table_(static_cast<size_t>((1 << 20) + sizes.D)) {
  Rng rng(1, 0);
  for (float& x : table_) x = static_cast<float>(rng.normal());
}

const float* TopicInputs::normals(const Row& row) const {
  return table_.data() + row.rng().below(table_.size() - static_cast<size_t>(sizes_.D));
}

void TopicInputs::noise(int kind, int64_t b, int64_t head, int64_t token, float* to) const {
  std::copy_n(normals({kind, b, head, token}), sizes_.D, to);
}

void TopicInputs::key(int64_t b, int64_t kv_head, int64_t token, float* to) const {
  const Row chunk{of_chunk, b, kv_head, token / chunk_};
  const auto topic =
      static_cast<int64_t>(Row{topic_of_chunk, b, kv_head, chunk.place}.rng().below(topics));
  const float* shared = normals({of_topic, 0, kv_head, topic});
  const float* own = normals(chunk);
  const float* noise = normals({of_key, b, kv_head, token});
  for (int64_t d = 0; d < sizes_.D; ++d) to[d] = shared[d] + 0.7f * own[d] + 0.6f * noise[d];
}

void TopicInputs::query(int64_t b, int64_t head, int64_t token, float* to) const {
  const int64_t kv_head = head / sizes_.group(), run = token / sharing_;
  const float* own = normals({of_run, b, kv_head, run});
  const float* noise = normals({of_query, b, head, token});
  for (int64_t d = 0; d < sizes_.D; ++d) to[d] = 0.7f * own[d] + 0.5f * noise[d];
  Rng topic = Row{topics_of_run, b, kv_head, run}.rng(),
      weight = Row{weights_of_run, b, head, run}.rng();
  for (int i = 0; i < topics_in_a_run; ++i) {
    const float* shared =
        normals({of_topic, 0, kv_head, static_cast<int64_t>(topic.below(topics))});
    const auto w = static_cast<float>(weight.uniform());
    for (int64_t d = 0; d < sizes_.D; ++d) to[d] += w * shared[d];
  }
}

}  // namespace entrain::cli
