#pragma once
// A tensor as the host reads and writes it: itself where it lives there, otherwise a pinned copy.
#include "core/tensor.h"

namespace entrain {

class Mirror {
 public:
  Mirror() = default;
  /// Contiguous tensors only.
  explicit Mirror(Tensor tensor);
  ~Mirror();
  Mirror(Mirror&& other) noexcept;
  Mirror& operator=(Mirror&& other) noexcept;

  /// Of the tensor's shape and type; f32 where that is bf16.
  Tensor host() const { return host_; }
  const Tensor& tensor() const { return tensor_; }

  /// Makes host() what the tensor is; waits for it.
  void download();
  /// Makes the tensor what host() is; waits until that may change again.
  void upload();
  /// The same in the order of the device's work: host() must stay as it is until that is done.
  void start_upload();

 private:
  Tensor tensor_, host_;
  void* pinned_ = nullptr;  // what is copied: host_'s memory, or bf16 to convert
};

/// A tensor in the host's memory that work of the GPU reads or writes, where there is one.
class Pinned {
 public:
  Pinned(Shape shape, DType dtype);
  ~Pinned();
  Pinned(const Pinned&) = delete;
  Pinned& operator=(const Pinned&) = delete;

  Tensor host() const { return host_; }

 private:
  bool on_gpu_;
  Tensor host_;
};

}  // namespace entrain
