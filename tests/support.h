#pragma once
// What the tests of the numerical core share: tensors that own their memory, recorded graphs,
// finite differences, errors.
#include <gtest/gtest.h>
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <vector>

#include "core/arena.h"
#include "core/rng.h"
#include "core/tape.h"

namespace entrain {

/// Makes tensors and keeps their memory; reals are of one type.
class Pool {
 public:
  explicit Pool(DType real = DType::f64, uint64_t seed = 1) : real_(real), rng_(seed, 0) {}

  Tensor make(Shape shape) { return make(shape, real_); }
  Tensor make(Shape shape, DType dtype) {
    memory_.emplace_back(static_cast<size_t>(shape.numel()) * size_of(dtype), Device::cpu);
    return Tensor::of(memory_.back().data(), shape, dtype);
  }
  /// Normal, mean 0.
  Tensor random(Shape shape, double deviation = 1);
  /// Uniform in [0, bound).
  Tensor integers(Shape shape, uint64_t bound);
  /// A random value and a zero gradient.
  Var leaf(Shape shape, double deviation = 1) { return {random(shape, deviation), make(shape)}; }

  Rng& rng() { return rng_; }

 private:
  DType real_;
  Rng rng_;
  std::deque<Buffer> memory_;
};

/// Element i of a contiguous tensor of reals.
inline double get(const Tensor& t, int64_t i) {
  return t.dtype == DType::f64 ? t.ptr<double>()[i] : t.ptr<float>()[i];
}

inline void put(const Tensor& t, int64_t i, double x) {
  if (t.dtype == DType::f64) {
    t.ptr<double>()[i] = x;
  } else {
    t.ptr<float>()[i] = static_cast<float>(x);
  }
}

inline void fill(const Tensor& t, double x) {
  for (int64_t i = 0; i < t.numel(); ++i) put(t, i, x);
}

inline Tensor Pool::random(Shape shape, double deviation) {
  const Tensor t = make(shape);
  for (int64_t i = 0; i < t.numel(); ++i) put(t, i, deviation * rng_.normal());
  return t;
}

inline Tensor Pool::integers(Shape shape, uint64_t bound) {
  const Tensor t = make(shape, DType::i32);
  for (int64_t i = 0; i < t.numel(); ++i) {
    t.ptr<int32_t>()[i] = static_cast<int32_t>(rng_.below(bound));
  }
  return t;
}

/// The elements of any view of reals, in order of its dimensions.
inline std::vector<double> values(const Tensor& t) {
  std::vector<double> out;
  std::function<void(int64_t, int)> walk = [&](int64_t at, int dim) {
    if (dim == t.shape.rank) {
      out.push_back(get(t, at));
      return;
    }
    for (int64_t i = 0; i < t[dim]; ++i) {
      walk(at + i * t.stride[static_cast<size_t>(dim)], dim + 1);
    }
  };
  walk(0, 0);
  return out;
}

/// ||actual - expected|| / ||expected||, for expected values near 0 relative to 1e-6 each; NaN and
/// differing sizes give infinity.
inline double relative_error(const std::vector<double>& actual,
                             const std::vector<double>& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    difference += (actual[i] - expected[i]) * (actual[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double floor = 1e-6 * std::sqrt(static_cast<double>(expected.size()));
  const double error = std::sqrt(difference) / std::max({std::sqrt(norm), floor, 1e-300});
  return std::isfinite(error) ? error : INFINITY;
}

inline double relative_error(const Tensor& actual, const std::vector<double>& expected) {
  return relative_error(values(actual), expected);
}

inline bool same_bits(const Tensor& a, const Tensor& b) {
  return a.shape == b.shape && a.dtype == b.dtype && std::memcmp(a.data, b.data, a.bytes()) == 0;
}

/// Sets the number of OpenMP threads for a while. Small loops are quicker on one.
class Threads {
 public:
  explicit Threads(int count) : before_(omp_get_max_threads()) { omp_set_num_threads(count); }
  ~Threads() { omp_set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

/// A tape built once to count its memory and once more on that memory.
class Graph {
 public:
  using Build = std::function<void(Tape&)>;

  Graph(Tape::Options options, const Build& build)
      : memory_(committed(options, build)), tape_(memory_, options) {
    build(tape_);
  }

  Tape* operator->() { return &tape_; }
  TapeMemory& memory() { return memory_; }

 private:
  static TapeMemory committed(Tape::Options options, const Build& build) {
    TapeMemory memory(Device::cpu);
    Tape counting(memory, options);
    build(counting);
    memory.commit();
    return memory;
  }

  TapeMemory memory_;
  Tape tape_;
};

inline constexpr Tape::Options training_f64{.dtype = DType::f64, .training = true};

/// Records loss = <y, dy>, dy random. It is y's one consumer.
inline void probe(Tape& tape, Pool& pool, Var y, double& loss) {
  const Tensor dy = pool.random(y.value.shape);
  tape.record(
      "probe", {}, {},
      [=, &loss] {
        loss = 0;
        for (int64_t i = 0; i < dy.numel(); ++i) loss += get(y.value, i) * get(dy, i);
      },
      [=] {
        for (int64_t i = 0; i < dy.numel(); ++i) put(y.grad, i, get(dy, i));
      });
}

/// d loss / d x[i] by central differences of fourth order; x is contiguous f64.
inline double slope(const Tensor& x, int64_t i, const std::function<double()>& loss, double h) {
  double& entry = x.ptr<double>()[i];
  const double here = entry;
  const auto at = [&](double offset) {
    entry = here + offset;
    return loss();
  };
  const double result = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h);
  entry = here;
  return result;
}

/// Relative error of a gradient against slopes, over some `samples` entries spread over x.
inline double gradient_error(const Tensor& x, const std::vector<double>& gradient,
                             const std::function<double()>& loss, int64_t samples = 60,
                             double h = 1e-3) {
  const Threads one(1);
  const int64_t step = std::max<int64_t>(1, x.numel() / samples);
  std::vector<double> actual, expected;
  for (int64_t i = 0; i < x.numel(); i += step) {
    actual.push_back(gradient[static_cast<size_t>(i)]);
    expected.push_back(slope(x, i, loss, h));
  }
  return relative_error(actual, expected);
}

/// What the graph's backward leaves in the gradients of inputs and weights is the slope of `loss`,
/// which its forward sets, and a second pass adds to the weights'.
inline void expect_gradients(Graph& graph, const double& loss, const std::vector<Var>& inputs,
                             const std::vector<Var>& weights) {
  std::vector<Var> leaves = inputs;
  leaves.insert(leaves.end(), weights.begin(), weights.end());
  const auto pass = [&] {
    for (const Var& x : inputs) fill(x.grad, 0);
    graph->forward();
    graph->backward();
  };
  for (const Var& w : weights) fill(w.grad, 0);
  pass();
  std::vector<std::vector<double>> gradients;
  for (const Var& x : leaves) gradients.push_back(values(x.grad));
  const auto evaluate = [&] {
    graph->forward();
    return loss;
  };
  for (size_t i = 0; i < leaves.size(); ++i) {
    EXPECT_LT(gradient_error(leaves[i].value, gradients[i], evaluate), 1e-6) << "leaf " << i;
  }
  for (size_t i = 0; i < weights.size(); ++i) {
    std::vector<double>& g = gradients[inputs.size() + i];
    fill(weights[i].grad, 0);
    pass();
    pass();
    for (double& x : g) x *= 2;
    EXPECT_LT(relative_error(weights[i].grad, g), 1e-12) << "weight " << i;
  }
}

}  // namespace entrain
