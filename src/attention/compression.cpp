#include "attention/compression.h"

namespace entrain {

Compression::Compression(const std::string& kind, Runs windows)
    : kind_(kind == "mlp" ? Kind::mlp : (kind == "linear" ? Kind::linear : Kind::mean)),
      windows_(windows) {}

// What is learned starts at 0 through its last matrix. Weights of a window's rows have three
// dimensions, [out, position, in].
std::vector<ParamSpec> Compression::params(const std::string& name, int64_t D) const {
  const int64_t l = windows_.length;
  switch (kind_) {
    case Kind::mlp:
      return {{.name = name + ".position", .shape = {l, D}, .decay = false},
              {.name = name + ".up.weight", .shape = {D, l, D}, .init_std = 0.02},
              {.name = name + ".down.weight", .shape = {D, D / 2}}};
    case Kind::linear:
      return {{.name = name + ".weight", .shape = {D, l, D}}};
    default:
      return {};
  }
}

int64_t Compression::products(int64_t D, int64_t tokens) const {
  const int64_t whole = windows_.length * D * D;
  const int64_t a_window = kind_ == Kind::mlp      ? whole + D * (D / 2)
                           : kind_ == Kind::linear ? whole
                                                   : 0;
  return windows_.within(tokens) * a_window;
}

Var Compression::record(Tape& tape, Var x, std::span<const Var> params) const {
  const Kernels<Device::cpu> k;
  const Runs windows = windows_;
  const int64_t B = x.value[0], H = x.value[1], D = x.value[3];
  const int64_t W = windows.within(x.value[2]), count = B * H * W, width = windows.length * D;
  const Var y = tape.var({B, H, W, D});
  const auto matrix = [&](Var w, Shape shape) {
    return Var{w.value.view(shape), tape.training() ? w.grad.view(shape) : Tensor{}};
  };
  const Var out = matrix(y, {count, D});

  if (kind_ == Kind::mean) {
    tape.record(
        "compression", y.value, x.grad, [=] { k.pool_runs(x.value, windows, y.value); },
        [=] { k.fold_runs({}, y.grad, windows, x.grad); });
    return y;
  }

  const Tensor rows = tape.scratch({count, width}), mean = tape.scratch({count, D});
  const Tensor drows = tape.training() ? tape.scratch(rows.shape) : Tensor{};
  if (kind_ == Kind::linear) {
    const Var w = matrix(params[0], {D, width});
    tape.record(
        "compression", y.value, x.grad,
        [=] {
          k.unfold_runs(x.value, windows, {}, rows);
          k.linear(rows, w.value, out.value);
          k.pool_runs(x.value, windows, mean);
          k.add(out.value, mean, out.value);
        },
        [=] {
          k.unfold_runs(x.value, windows, {}, rows);
          k.linear_backward(out.grad, rows, w.value, drows, w.grad);
          k.fold_runs(drows, y.grad, windows, x.grad);
        },
        {w.grad});
    return y;
  }

  const Var position = params[0], up = matrix(params[1], {D, width}), down = params[2];
  const Tensor gate_up = tape.keep({count, D}), hidden = tape.keep({count, D / 2});
  Tensor dgate_up, dhidden;
  if (tape.training()) {
    dgate_up = tape.scratch(gate_up.shape);
    dhidden = tape.scratch(hidden.shape);
  }
  tape.record(
      "compression", y.value, x.grad,
      [=] {
        k.unfold_runs(x.value, windows, position.value, rows);
        k.linear(rows, up.value, gate_up);
        k.swiglu(gate_up, hidden);
        k.linear(hidden, down.value, out.value);
        k.pool_runs(x.value, windows, mean);
        k.add(out.value, mean, out.value);
      },
      [=] {
        k.unfold_runs(x.value, windows, position.value, rows);
        k.linear_backward(out.grad, hidden, down.value, dhidden, down.grad);
        k.swiglu_backward(dhidden, gate_up, dgate_up);
        k.linear_backward(dgate_up, rows, up.value, drows, up.grad);
        k.add_rows(drows, position.grad);
        k.fold_runs(drows, y.grad, windows, x.grad);
      },
      {position.grad, up.grad, down.grad});
  return y;
}

}  // namespace entrain
