#include "core/params.h"

#include <algorithm>

#include "core/gpu.h"
#include "core/mirror.h"
#include "core/rng.h"

namespace entrain {
namespace {

// FNV-1a: a stable stream number for a name.
uint64_t hash(const std::string& name) {
  uint64_t h = 14695981039346656037ull;
  for (const char c : name) h = (h ^ static_cast<uint8_t>(c)) * 1099511628211ull;
  return h;
}

// Of vectors, in elements: what a product or a vector of them wants.
constexpr int64_t alignment = 64;

int64_t round_up(int64_t n) {
  return (n + alignment - 1) / alignment * alignment;
}

/// Where the parameter after one at `at` begins. Matrices follow each other without a gap, so that
/// some can be one product; after vectors, the next is aligned as a product wants it.
int64_t after(int64_t at, const ParamSpec& spec) {
  at += spec.shape.numel();
  return spec.shape.rank > 1 ? at : round_up(at);
}

}  // namespace

Params::Params(const std::vector<ParamSpec>& specs, uint64_t seed, bool training, Device device,
               DType dtype, Shard shard)
    : shard_(shard) {
  int64_t total = 0;
  for (const ParamSpec& spec : specs) {
    total = after(total, spec);
    numel_ += spec.shape.numel();
  }
  shard_length_ = round_up((total + shard.count - 1) / shard.count);
  const auto make = [&](Buffer& memory, int64_t length, DType type, int64_t capacity) {
    memory = Buffer(static_cast<size_t>(capacity) * size_of(type), device);
    return Tensor::of(memory.data(), {length}, type, device);
  };
  const DType wide = dtype == DType::bf16 ? DType::f32 : dtype;
  values_ = make(memory_[0], total, wide, shard.count * shard_length_);
  if (training) {
    const int64_t own = shard_begin(shard.index + 1) - shard_begin(shard.index);
    grads_ = make(memory_[1], total, wide, total);
    m_ = make(memory_[2], own, wide, own);
    v_ = make(memory_[3], own, wide, own);
    decays_ = make(decays_memory_, total, DType::u8, total);
  }
  if (dtype == DType::bf16) rounded_ = make(rounded_memory_, total, DType::bf16, total);

  Mirror values(values_), decays(decays_);
  std::vector<int64_t> starts;
  int64_t at = 0;
  for (const ParamSpec& spec : specs) {
    const int64_t n = spec.shape.numel();
    auto window = [&](const Tensor& t) {
      return t ? t.slice(0, at, n).view(spec.shape) : Tensor{};
    };
    params_.push_back({spec.name, window(values_),
                       spec.shape.rank > 1 ? window(rounded_) : Tensor{}, window(grads_), at,
                       spec.decay, spec.adopt});
    starts.push_back(at);
    if (training) std::fill_n(decays.host().ptr<uint8_t>() + at, n, spec.decay ? 1 : 0);
    at = after(at, spec);
  }
  const Tensor host = values.host();
  const auto fill = [&](auto* value, const ParamSpec& spec) {
    Rng rng(seed, hash(spec.name));
    for (int64_t i = 0; i < spec.shape.numel(); ++i) {
      const double noise = spec.init_std > 0 ? spec.init_std * rng.normal() : 0.0;
      value[i] = static_cast<std::remove_reference_t<decltype(*value)>>(spec.init_mean + noise);
    }
  };
#pragma omp parallel for schedule(dynamic) if (total > 1 << 22)  // seconds, where it is many
  for (size_t i = 0; i < specs.size(); ++i) {
    wide == DType::f64 ? fill(host.ptr<double>() + starts[i], specs[i])
                       : fill(host.ptr<float>() + starts[i], specs[i]);
  }
  values.upload();
  decays.upload();
  round();
}

size_t Params::bytes() const {
  size_t sum = decays_memory_.bytes() + rounded_memory_.bytes();
  for (const Buffer& memory : memory_) sum += memory.bytes();
  return sum;
}

void Params::round() {
  if (rounded_)
    gpu::round_to_bf16(rounded_.data, values_.data, static_cast<size_t>(values_.numel()));
}

int64_t Params::shard_begin(int index) const {
  return std::min(index * shard_length_, values_.numel());
}

Tensor Params::of_shard(const Tensor& flat) const {
  const int64_t begin = shard_begin(shard_.index), end = shard_begin(shard_.index + 1);
  return flat ? flat.slice(0, begin, end - begin) : Tensor{};
}

Tensor Params::shards() const {
  return Tensor::of(values_.data, {shard_.count, shard_length_}, values_.dtype, values_.device);
}

const Param& Params::get(const std::string& name) const {
  const auto it =
      std::find_if(params_.begin(), params_.end(), [&](const Param& p) { return p.name == name; });
  require(it != params_.end(), "the model has no parameter {}", name);
  return *it;
}

Tensor Params::grads(size_t first, size_t count) const {
  const Tensor &begin = params_[first].grad, &last = params_[first + count - 1].grad;
  const auto distance = static_cast<const char*>(last.data) - static_cast<const char*>(begin.data);
  const int64_t n = distance / static_cast<int64_t>(size_of(begin.dtype)) + last.numel();
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
  return {
      first, widen(begin.value), widen(begin.rounded), widen(begin.grad), begin.begin, begin.decay,
      {}};
}

}  // namespace entrain
