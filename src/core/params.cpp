#include "core/params.h"

#include <algorithm>

#include "core/rng.h"

namespace entrain {
namespace {

// FNV-1a: a stable stream number for a name.
uint64_t hash(const std::string& name) {
  uint64_t h = 14695981039346656037ull;
  for (const char c : name) h = (h ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  return h;
}

}  // namespace

Params::Params(const std::vector<ParamSpec>& specs, uint64_t seed, bool training, Device device,
               DType dtype) {
  int64_t total = 0;
  for (const ParamSpec& spec : specs) total += spec.shape.numel();
  Tensor* flat[] = {&values_, &grads_, &m_, &v_};
  for (int i = 0; i < (training ? 4 : 1); ++i) {
    memory_[i] = Buffer(static_cast<size_t>(total) * size_of(dtype), device);
    *flat[i] = Tensor::of(memory_[i].data(), {total}, dtype, device);
  }
  if (training) {
    decays_memory_ = Buffer(static_cast<size_t>(total), device);
    decays_ = Tensor::of(decays_memory_.data(), {total}, DType::u8, device);
  }
  int64_t at = 0;
  for (const ParamSpec& spec : specs) {
    const int64_t n = spec.shape.numel();
    auto window = [&](const Tensor& t) {
      return t ? t.slice(0, at, n).view(spec.shape) : Tensor{};
    };
    params_.push_back({spec.name, window(values_), window(grads_), window(m_), window(v_),
                       spec.decay, spec.adopt});
    Rng rng(seed, hash(spec.name));
    auto fill = [&](auto* value) {
      for (int64_t i = 0; i < n; ++i) {
        const double noise = spec.init_std > 0 ? spec.init_std * rng.normal() : 0.0;
        value[i] = static_cast<std::remove_reference_t<decltype(*value)>>(spec.init_mean + noise);
      }
    };
    const Tensor value = params_.back().value;
    dtype == DType::f64 ? fill(value.ptr<double>()) : fill(value.ptr<float>());
    if (training) std::fill_n(decays_.ptr<uint8_t>() + at, n, spec.decay ? 1 : 0);
    at += n;
  }
}

const Param& Params::get(const std::string& name) const {
  const auto it =
      std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return p.name == name; });
  require(it != params_.end(), "the model has no parameter {}", name);
  return *it;
}

Tensor Params::grads(size_t first, size_t count) const {
  int64_t n = 0;
  for (size_t i = first; i < first + count; ++i) n += params_[i].grad.numel();
  const Tensor& begin = params_[first].grad;
  return Tensor::of(begin.data, {n}, begin.dtype, begin.device);
}

Param Params::packed(const std::string& first, int count) const {
  const Param& begin = get(first);
  const Param* p = &begin;
  int64_t rows = 0;
  for (int i = 0; i < count; ++i) rows += p[i].value[0];
  const Shape shape{rows, begin.value[1]};
  auto widen = [&](const Tensor& t) {
    return t ? Tensor::of(t.data, shape, t.dtype, t.device) : Tensor{};
  };
  return {first, widen(begin.value), widen(begin.grad), widen(begin.m), widen(begin.v), begin.decay,
          {}};
}

}  // namespace entrain
