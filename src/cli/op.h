#pragma once
// What the operations of `entrain op` share: a case of a file, and their names.
#include <cmath>
#include <map>
#include <string>
#include <vector>

#include "core/arena.h"
#include "core/h5.h"
#include "core/mirror.h"
#include "core/tape.h"
#include "kernels/kernels.h"

namespace entrain::cli {

/// One group: reads inputs and parameters to the device, collects results and writes them.
class Case {
 public:
  Case(const h5::File& in, std::string group, Device device, DType real)
      : device(device), real(real), in_(in), group_(std::move(group)) {}

  const Device device;
  const DType real;  // type of the arithmetic
  /// Of sums, norms and the like: f32 where the arithmetic is bf16.
  DType sum_type() const { return real == DType::bf16 ? DType::f32 : real; }

  bool has(const std::string& name) const { return in_.has(group_ + "/in/" + name); }
  std::vector<std::string> inputs() const { return in_.datasets(group_ + "/in"); }

  Tensor input(const std::string& name, DType dtype, int rank, bool may_be_empty = false) {
    const std::string path = group_ + "/in/" + name;
    require(in_.has(path), "{}: case {} has no input in/{}", in_.path(), group_, name);
    const Shape shape = in_.shape(path);
    require(shape.rank == rank, "{}: {} has shape {}; {} dimensions are needed", in_.path(), path,
            shape.to_string(), rank);
    require(shape.numel() > 0 || may_be_empty, "{}: {} is empty, with shape {}", in_.path(), path,
            shape.to_string());
    const Tensor t = make(shape, dtype);
    Mirror& mirror = mirror_of(t);
    in_.read(path, mirror.host());
    mirror.upload();
    return t;
  }
  /// What a tensor of this case holds, on the host.
  Tensor host(Tensor t) {
    mirror_of(t).download();
    return mirror_of(t).host();
  }
  /// A result that the host writes.
  Tensor host_result(const std::string& name, Shape shape, DType dtype) {
    memory_.emplace_back(static_cast<size_t>(shape.numel()) * size_of(dtype), Device::cpu);
    return results_[name] = Tensor::of(memory_.back().data(), shape, dtype);
  }

  double parameter(const std::string& name, double otherwise) const {
    const double value = in_.has_attribute(group_, name) ? in_.number(group_, name) : otherwise;
    require(std::isfinite(value), "{}: {} is {}, not a finite number", where(), name, value);
    return value;
  }
  int64_t required(const std::string& name) const {
    require(in_.has_attribute(group_, name), "{}: case {} has no attribute {}", in_.path(), group_,
            name);
    return in_.integer(group_, name);
  }
  std::string text(const std::string& name) const { return in_.text(group_, name); }
  std::string where() const { return in_.path() + ": case " + group_; }

  Tensor make(Shape shape) { return make(shape, real); }
  Tensor make(Shape shape, DType dtype) {
    memory_.emplace_back(static_cast<size_t>(shape.numel()) * size_of(dtype), device);
    return Tensor::of(memory_.back().data(), shape, dtype, device);
  }
  Tensor result(const std::string& name, Shape shape) { return result(name, shape, real); }
  Tensor result(const std::string& name, Shape shape, DType dtype) {
    return results_[name] = make(shape, dtype);
  }

  void write(h5::File& out) {
    for (const auto& [name, value] : results_) {
      out.write(group_ + "/" + name, host(value), h5::Pack::gzip);
    }
  }

 private:
  const h5::File& in_;
  std::string group_;
  Mirror& mirror_of(Tensor t) {
    const auto [it, fresh] = mirrors_.try_emplace(t.data);
    if (fresh) it->second = Mirror(t);
    return it->second;
  }

  std::vector<Buffer> memory_;
  std::map<void*, Mirror> mirrors_;
  std::map<std::string, Tensor> results_;
};

/// The attributes block, topk, init_blocks, local_blocks, l and d, otherwise the papers' values.
BlockSelection read_selection(const Case& c);
/// out/selected: which of M blocks each query of mask [B, Hkv, N, words], on the host, attends.
void write_selected(Case& c, Tensor mask, int64_t M);
/// out/density, of what a forward pass read.
void write_density(Case& c, Tensor read);

// The operations; each throws Error where the case does not fit.
void run_entmax(Case& c);
void run_full(Case& c);
void run_dash(Case& c);
void run_nsa(Case& c);
void run_infllmv2(Case& c);
void run_model(Case& c);

}  // namespace entrain::cli
