#pragma once
// NSA's learned compression: phi turns the `length` keys (or values) of a window into one. It
// starts as their mean, which what is learned adds to:
//   mlp     mean + down swiglu(up (x + position)), hidden width head_dim / 2
//   linear  mean + weight x
//   mean    nothing learned
// x being the window's rows side by side. Parameters are shared by a layer's key-value heads.
#include <span>
#include <string>
#include <vector>

#include "core/params.h"
#include "core/tape.h"
#include "kernels/kernels.h"

namespace entrain {

class Compression {
 public:
  Compression(const std::string& kind, Runs windows);

  /// Named NAME.position and so on.
  std::vector<ParamSpec> params(const std::string& name, int64_t head_dim) const;

  /// Multiplications forward, for one head's sequence of so many tokens.
  int64_t products(int64_t head_dim, int64_t tokens) const;

  /// Records x [B, H, N, D] (a view) to [B, H, windows.within(N), D]; writes x's gradient whole.
  Var record(Tape& tape, Var x, std::span<const Var> params) const;

  static std::vector<const char*> kinds() { return {"mlp", "linear", "mean"}; }

 private:
  enum class Kind : uint8_t { mlp, linear, mean } kind_;
  Runs windows_;
};

}  // namespace entrain
