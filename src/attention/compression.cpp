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

Var Compression::record(Tape& tape, Var x, std::span<const Var> params, Queries queries,
                        Tensor cache) const {
  const Runs windows = windows_;
  const int64_t B = x.value[0], H = x.value[1], D = x.value[3], width = windows.length * D;
  // Windows of one run of the tape, at most.
  const int64_t W =
      queries.decoding() ? (queries.count - 1) / windows.stride + 1 : windows.within(queries.count);
  const int64_t count = B * H * W;
  const Var y = queries.decoding() ? Var{cache, {}} : tape.var({B, H, W, D});

  if (kind_ == Kind::mean) {
    tape.record(
        "compression", y.value, x.grad,
        [=](auto k) {
          const auto [begin, n, tokens] = queries.complete(x.value, windows);
          k.pool_runs(tokens, windows, y.value.slice(2, begin, n));
        },
        [=](auto k) { k.fold_runs({}, y.grad, windows, x.grad); });
    return y;
  }

  const auto matrix = [&](Var w, Shape shape) {
    return Var{w.value.view(shape), tape.training() ? w.grad.view(shape) : Tensor{}};
  };
  const Tensor rows = tape.scratch({count, width});
  const Tensor learned = tape.scratch({count, D}), mean = tape.scratch({count, D});
  const Tensor dy = tape.training() ? y.grad.view({count, D}) : Tensor{};
  const Tensor drows = tape.training() ? tape.scratch(rows.shape) : Tensor{};
  // Calls learn(n, tokens) to write the first n rows of `learned`, then adds the windows' means.
  const auto add_to_mean = [=](auto k, const auto& learn) {
    const auto [begin, windows_now, tokens] = queries.complete(x.value, windows);
    if (windows_now == 0) return;
    const int64_t n = B * H * windows_now;
    learn(n, tokens);
    const Tensor sum = learned.slice(0, 0, n), means = mean.slice(0, 0, n);
    k.pool_runs(tokens, windows, means.view({B, H, windows_now, D}));
    k.add(sum, means, sum);
    k.copy_rows(sum.view({B, H, windows_now, D}), y.value.slice(2, begin, windows_now));
  };

  if (kind_ == Kind::linear) {
    const Var w = matrix(params[0], {D, width});
    tape.record(
        "compression", y.value, x.grad,
        [=](auto k) {
          add_to_mean(k, [&](int64_t n, Tensor tokens) {
            k.unfold_runs(tokens, windows, {}, rows.slice(0, 0, n));
            k.linear(rows.slice(0, 0, n), w.value, learned.slice(0, 0, n));
          });
        },
        [=](auto k) {
          k.unfold_runs(x.value, windows, {}, rows);
          k.linear_backward(dy, rows, w.value, drows, w.grad);
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
      [=](auto k) {
        add_to_mean(k, [&](int64_t n, Tensor tokens) {
          k.unfold_runs(tokens, windows, position.value, rows.slice(0, 0, n));
          k.linear(rows.slice(0, 0, n), up.value, gate_up.slice(0, 0, n));
          k.swiglu(gate_up.slice(0, 0, n), hidden.slice(0, 0, n));
          k.linear(hidden.slice(0, 0, n), down.value, learned.slice(0, 0, n));
        });
      },
      [=](auto k) {
        k.unfold_runs(x.value, windows, position.value, rows);
        k.linear_backward(dy, hidden, down.value, dhidden, down.grad);
        k.swiglu_backward(dhidden, gate_up, dgate_up);
        k.linear_backward(dgate_up, rows, up.value, drows, up.grad);
        k.add_rows(drows, position.grad);
        k.fold_runs(drows, y.grad, windows, x.grad);
      },
      {position.grad, up.grad, down.grad});
  return y;
}

}  // namespace entrain
