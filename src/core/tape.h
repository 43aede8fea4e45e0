#pragma once
// The tape records a computation once and runs it every step: each op adds one entry with a forward
// and a backward closure over tensors whose addresses never change. Closures take the kernels of
// the tape's device. Recording on memory that is not committed yet predicts its size; nothing is
// allocated when the tape runs.
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/arena.h"
#include "core/stopwatch.h"

namespace entrain {

/// A value and the gradient of the loss with respect to it (empty when the tape does not train).
struct Var {
  Tensor value;
  Tensor grad;
};

/// Memory of a tape: what backward needs, gradients of activations, and what lives within one op.
struct TapeMemory {
  explicit TapeMemory(Device device) : values(device), grads(device), scratch(device) {}

  Device device() const { return values.device(); }
  size_t peak() const { return values.peak() + grads.peak() + scratch.peak(); }
  void commit();  // allocate what was counted
  void rewind();  // the next tape starts from the bottom

  Arena values, grads, scratch;
};

/// Seconds of ops. Forward runs that recompute count as forward.
struct OpTime {
  double forward = 0, backward = 0;
};

class Tape {
 public:
  struct Options {
    DType dtype = DType::f32;  // of activations and gradients
    bool training = false;     // allocate gradients and record backward closures
    bool recompute = false;  // keep only the inputs of blocks; run their forward again in backward
  };

  Tape(TapeMemory& memory, Options options) : memory_(memory), options_(options) {}
  Tape(const Tape&) = delete;  // closures hold addresses
  Tape& operator=(const Tape&) = delete;

  bool training() const { return options_.training; }
  Device device() const { return memory_.device(); }
  DType dtype() const { return options_.dtype; }
  /// Of sums, norms and the like: f32 where activations are bf16.
  DType sum_dtype() const { return dtype() == DType::bf16 ? DType::f32 : dtype(); }

  /// An activation. Its gradient is written once, by the backward of its one consumer.
  Var var(Shape shape) { return var(shape, dtype()); }
  Var var(Shape shape, DType dtype);
  /// An activation with several consumers: its gradient starts at 0 and they add to it.
  Var shared_var(Shape shape);
  /// Kept from forward to backward, and after it where no block that is recomputed came before.
  Tensor keep(Shape shape) { return keep(shape, dtype()); }
  Tensor keep(Shape shape, DType dtype) { return memory_.values.alloc(shape, dtype); }
  /// Valid within one closure; all ops share it. Each call of one op must follow the others of that
  /// op.
  Tensor scratch(Shape shape) { return scratch(shape, dtype()); }
  Tensor scratch(Shape shape, DType dtype) { return memory_.scratch.alloc(shape, dtype); }

  /// Adds an op. `value` is what forward writes, `grad` and `more_grads` (of weights, of further
  /// inputs) what the op writes or adds to on the way back: what first_non_finite() looks at. Each
  /// may be empty. forward and backward take the kernels of the tape's device, or nothing.
  template <class Forward, class Backward = std::nullptr_t>
  void record(const std::string& name, Tensor value, Tensor grad, Forward forward,
              Backward backward = {}, std::vector<Tensor> more_grads = {}) {
    add(name, value, grad, bind(std::move(forward)), bind(std::move(backward)),
        std::move(more_grads));
  }

  /// Records body(x) as a unit of memory: what it allocates is given back for the next block where
  /// the mode allows, and only its result stays. The result must share x's gradient, as the
  /// residual stream does.
  Var block(const std::string& name, Var x, const std::function<Var(Var)>& body);

  /// Records body; the names of its ops begin with "name.".
  void scope(const std::string& name, const std::function<void()>& body);

  /// The backward pass calls f when it is done with everything recorded after this point.
  void after_backward(std::function<void()> f);

  void forward();
  void backward();

  /// Times the ops with `part` in their name ("": all) from the next forward() on.
  void time_ops(std::string_view part);
  /// What the timed ops with `part` in their name took in the last forward() and backward(). On the
  /// GPU these must be done.
  OpTime time(std::string_view part) const;
  /// The same for all timed ops, by their names without scopes.
  std::map<std::string, OpTime> times() const;

  /// Runs forward and backward op by op and names the first that writes a NaN or an infinity; "" if
  /// none. Gradients of weights are added to as ever: what they hold before counts.
  std::string first_non_finite();

 private:
  struct Entry {
    std::string name;
    Tensor value;
    std::vector<Tensor> grads;
    std::function<void()> forward, backward;
    bool timed = false;
    Stopwatch forward_time, backward_time;
  };

  template <class F>
  std::function<void()> bind(F f) const {
    if constexpr (std::is_same_v<F, std::nullptr_t>) {
      return {};
    } else if constexpr (std::is_invocable_v<F>) {
      return f;
    } else {  // with_kernels() is kernels/kernels.h's, which those who pass such an f include
      return [f = std::move(f), device = device()] { with_kernels(device, f); };
    }
  }
  void add(const std::string& name, Tensor value, Tensor grad, std::function<void()> forward,
           std::function<void()> backward, std::vector<Tensor> more_grads);
  void run_forward(size_t begin, size_t end);
  void clear_grads();

  TapeMemory& memory_;
  Options options_;
  std::string scope_;  // prefix of names: "layers.3.attention."
  std::vector<Entry> entries_;
  std::vector<Tensor> shared_grads_;
};

}  // namespace entrain
