#pragma once
// One layer's attention, forward and backward, as training runs it: the method on a tape, timed
// part by part. Layers share their inputs.
#include <memory>
#include <optional>

#include "attention/attention.h"
#include "cli/bench_density.h"
#include "cli/bench_inputs.h"

namespace entrain::cli {

/// q, k and v, packed as a layer's projection is, and the gradient of the output.
class LayerInputs {
 public:
  LayerInputs(const AttentionSizes& sizes, const TopicInputs& rows, Device device, DType dtype);

  const AttentionSizes sizes;
  Tensor q() const { return q_of(qkv_); }
  Tensor k() const { return k_of(qkv_); }
  Tensor v() const { return v_of(qkv_); }
  /// Views of what lies as q, k and v do.
  Shape packed() const { return qkv_.shape; }
  Tensor q_of(Tensor qkv) const;
  Tensor k_of(Tensor qkv) const;
  Tensor v_of(Tensor qkv) const;
  Tensor dout() const { return dout_; }
  Device device() const { return memory_.device(); }
  DType dtype() const { return qkv_.dtype; }

 private:
  Arena memory_;
  Tensor qkv_, dout_;
};

/// Columns [first, first + count width) of x [B, N, columns] as heads [B, count, N, width].
Tensor heads(Tensor x, int64_t first, int64_t count, int64_t width);

class Layer {
 public:
  Layer(std::unique_ptr<AttentionMethod> method, const LayerInputs& in);

  /// Turns gamma until routing attends so much.
  void seek(double density);
  /// Runs forward once and says what it attended.
  ReadCounters::Read read();
  /// What forward chose, see AttentionMethod::record().
  Tensor mask() const { return mask_; }

  /// Attention over the chosen keys, and all that comes to the choice. Seconds.
  struct Times {
    OpTime attention, routing;

    double total() const {
      return attention.forward + attention.backward + routing.forward + routing.backward;
    }
  };
  /// Runs forward and backward, on the GPU as a graph of both.
  Times run();

 private:
  void record(const LayerInputs& in);

  std::unique_ptr<AttentionMethod> method_;
  TapeMemory memory_;
  std::unique_ptr<Tape> tape_;
  Tensor mask_;
  ReadCounters counters_;
  std::optional<gpu::Graph> graph_;
};

}  // namespace entrain::cli
