#include "core/tape.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <utility>

namespace entrain {
namespace {

/// Whether all elements are finite; dimension by dimension, since attention writes strided views.
bool finite(const Tensor& t) {
  if (!t || t.numel() == 0) return true;
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
      if (!std::isfinite(p[i * t.stride[0]])) return false;
    }
    return true;
  };
  return t.dtype == DType::f64 ? all(t.ptr<double>()) : all(t.ptr<float>());
}

/// Calls f and adds the seconds it took.
void run(const std::function<void()>& f, double& seconds) {
  const auto begin = std::chrono::steady_clock::now();
  f();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

void TapeMemory::commit() {
  for (Arena* arena : {&values, &grads, &scratch}) arena->commit();
}

void TapeMemory::rewind() {
  for (Arena* arena : {&values, &grads, &scratch}) arena->release(0);
}

Var Tape::var(Shape shape) {
  return {keep(shape), training() ? memory_.grads.alloc(shape, dtype()) : Tensor{}};
}

Var Tape::shared_var(Shape shape) {
  const Var v = var(shape);
  if (v.grad) shared_grads_.push_back(v.grad);
  return v;
}

void Tape::record(const std::string& name, Tensor value, Tensor grad, std::function<void()> forward,
                  std::function<void()> backward, std::vector<Tensor> more_grads) {
  if (!training()) backward = {};
  more_grads.push_back(grad);
  entries_.push_back(
      {scope_ + name, value, std::move(more_grads), std::move(forward), std::move(backward), {}});
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
  const auto copy = [from = y.value, to = result.value] {
    std::memcpy(to.data, from.data, to.bytes());
  };
  record(name, result.value, {}, copy, [this, begin, end] { run_forward(begin, end); });
  return result;
}

void Tape::scope(const std::string& name, const std::function<void()>& body) {
  const std::string outer = scope_;
  scope_ += name + ".";
  body();
  scope_ = outer;
}

void Tape::after_backward(std::function<void()> f) {
  record("", {}, {}, {}, std::move(f));
}

void Tape::run_forward(size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    Entry& entry = entries_[i];
    if (entry.forward) run(entry.forward, entry.time.forward);
  }
}

void Tape::clear_grads() {
  for (const Tensor& grad : shared_grads_) std::memset(grad.data, 0, grad.bytes());
}

void Tape::forward() {
  run_forward(0, entries_.size());
}

void Tape::backward() {
  clear_grads();
  for (size_t i = entries_.size(); i-- > 0;) {
    Entry& entry = entries_[i];
    if (entry.backward) run(entry.backward, entry.time.backward);
  }
}

OpTime Tape::time(std::string_view part) const {
  OpTime sum;
  for (const Entry& entry : entries_) {
    if (entry.name.find(part) == entry.name.npos) continue;
    sum.forward += entry.time.forward;
    sum.backward += entry.time.backward;
  }
  return sum;
}

void Tape::clear_times() {
  for (Entry& entry : entries_) entry.time = {};
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
