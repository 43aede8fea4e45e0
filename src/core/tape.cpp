#include "core/tape.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "core/gpu.h"

namespace entrain {
namespace {

bool is_finite(BFloat16 x) {
  return (x.bits & 0x7f80) != 0x7f80;  // the exponent is not all ones
}
bool is_finite(double x) {
  return std::isfinite(x);
}

bool finite(const Tensor& t);

/// The same for a view in device memory: its whole extent is fetched.
bool finite_there(Tensor t) {
  int64_t extent = 1;
  for (int i = 0; i < t.shape.rank; ++i) {
    extent += (t[i] - 1) * t.stride[static_cast<size_t>(i)];
  }
  std::vector<std::byte> host(static_cast<size_t>(extent) * size_of(t.dtype));
  gpu::to_host(host.data(), t.data, host.size());
  gpu::synchronize();
  t.data = host.data();
  t.device = Device::cpu;
  return finite(t);
}

/// Whether all elements are finite; dimension by dimension, since attention writes strided views.
bool finite(const Tensor& t) {
  if (!t || t.numel() == 0) return true;
  if (t.device == Device::cuda) return finite_there(t);
  if (t.shape.rank > 1) {
    for (int64_t i = 0; i < t[0]; ++i) {
      Tensor inner = t.slice(0, i, 1);
      std::copy(inner.shape.extent.begin() + 1, inner.shape.extent.end(),
                inner.shape.extent.begin());
      std::copy(inner.stride.begin() + 1, inner.stride.end(), inner.stride.begin());
      --inner.shape.rank;
      if (!finite(inner)) return false;
    }
    return true;
  }
  auto all = [&](const auto* p) {
    for (int64_t i = 0; i < t[0]; ++i) {
      if (!is_finite(p[i * t.stride[0]])) return false;
    }
    return true;
  };
  if (t.dtype == DType::bf16) return all(t.ptr<BFloat16>());
  return t.dtype == DType::f64 ? all(t.ptr<double>()) : all(t.ptr<float>());
}

/// Calls f, on the clock where it is timed.
void run(const std::function<void()>& f, bool timed, Stopwatch& watch) {
  if (!timed) return f();
  watch.start();
  f();
  watch.stop();
}

}  // namespace

void TapeMemory::commit() {
  for (Arena* arena : {&values, &grads, &scratch}) arena->commit();
}

void TapeMemory::rewind() {
  for (Arena* arena : {&values, &grads, &scratch}) arena->release(0);
}

Var Tape::var(Shape shape, DType dtype) {
  return {keep(shape, dtype), training() ? memory_.grads.alloc(shape, dtype) : Tensor{}};
}

Var Tape::shared_var(Shape shape) {
  const Var v = var(shape);
  if (v.grad) shared_grads_.push_back(v.grad);
  return v;
}

void Tape::add(const std::string& name, Tensor value, Tensor grad, std::function<void()> forward,
               std::function<void()> backward, std::vector<Tensor> more_grads) {
  if (!training()) backward = {};
  more_grads.push_back(grad);
  entries_.push_back({.name = scope_ + name,
                      .value = value,
                      .grads = std::move(more_grads),
                      .forward = std::move(forward),
                      .backward = std::move(backward),
                      .forward_time = Stopwatch(device()),
                      .backward_time = Stopwatch(device())});
  memory_.scratch.release(0);
}

Var Tape::block(const std::string& name, Var x, const std::function<Var(Var)>& body) {
  const bool reuse = options_.recompute || !training();
  const Var result = reuse ? Var{keep(x.value.shape), x.grad} : Var{};
  const size_t values = memory_.values.mark(), grads = memory_.grads.mark();
  const size_t begin = entries_.size();
  Var y;
  scope(name, [&] { y = body(x); });
  require(y.grad.data == x.grad.data, "block {} does not end in the residual stream", name);
  memory_.grads.release(grads);  // backward leaves the block before it enters the one below
  if (!reuse) return y;

  memory_.values.release(values);
  const size_t end = entries_.size();
  record(
      name, result.value, {}, [from = y.value, to = result.value] { copy(from, to); },
      [this, begin, end] { run_forward(begin, end); });
  return result;
}

void Tape::scope(const std::string& name, const std::function<void()>& body) {
  const std::string outer = scope_;
  scope_ += name + ".";
  body();
  scope_ = outer;
}

void Tape::after_backward(std::function<void()> f) {
  record("after_backward", {}, {}, nullptr, std::move(f));
}

void Tape::run_forward(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    Entry& entry = entries_[i];
    if (entry.forward) run(entry.forward, entry.timed, entry.forward_time);
  }
}

void Tape::clear_grads() {
  for (const Tensor& grad : shared_grads_) zero(grad);
}

void Tape::forward() {
  for (Entry& entry : entries_) entry.forward_time.reset();
  run_forward(0, entries_.size());
}

void Tape::backward() {
  for (Entry& entry : entries_) entry.backward_time.reset();
  clear_grads();
  for (size_t i = entries_.size(); i-- > 0;) {
    Entry& entry = entries_[i];
    if (entry.backward) run(entry.backward, entry.timed, entry.backward_time);
  }
}

void Tape::time_ops(std::string_view part) {
  for (Entry& entry : entries_) entry.timed = entry.name.find(part) != entry.name.npos;
}

OpTime Tape::time(std::string_view part) const {
  OpTime sum;
  for (const Entry& entry : entries_) {
    if (entry.name.find(part) == entry.name.npos) continue;
    sum.forward += entry.forward_time.seconds();
    sum.backward += entry.backward_time.seconds();
  }
  return sum;
}

std::map<std::string, OpTime> Tape::times() const {
  std::map<std::string, OpTime> sums;
  for (const Entry& entry : entries_) {
    if (!entry.timed) continue;
    OpTime& sum = sums[entry.name.substr(entry.name.rfind('.') + 1)];
    sum.forward += entry.forward_time.seconds();
    sum.backward += entry.backward_time.seconds();
  }
  return sums;
}

std::string Tape::first_non_finite() {
  for (const Entry& entry : entries_) {
    if (entry.forward) entry.forward();
    if (!finite(entry.value)) return entry.name + " (forward)";
  }
  clear_grads();
  for (size_t i = entries_.size(); i-- > 0;) {
    if (entries_[i].backward) entries_[i].backward();
    if (!std::ranges::all_of(entries_[i].grads, finite)) return entries_[i].name + " (backward)";
  }
  return "";
}

}  // namespace entrain
