#pragma once
// Differentiable operations of the decoder. Each records its forward and its handwritten backward
// on the tape (one file an op). Weights are Vars too: their gradients are added to. T = batch x
// tokens.
#include "core/tape.h"

namespace entrain::ops {

/// [T, d] rows of w [V, d]; tokens i32 [T]. The result starts the residual stream.
Var embedding(Tape& tape, Tensor tokens, Var w);

/// x [T, in] times w [out, in] transposed.
Var linear(Tape& tape, Var x, Var w);

/// base [T, out] + x w^T: a branch joins the residual stream. The result shares base's gradient:
/// the stream has one from end to end, which the norm before each branch adds to.
Var add_linear(Tape& tape, Var base, Var x, Var w);

/// RMSNorm of x [T, d] with weight w [d]; adds to x's gradient.
Var rmsnorm(Tape& tape, Var x, Var w, double eps);

/// Turns the heads x [B, H, N, D] (a view) in place by their positions. cos_sin [N, D] from
/// rope_table(), with more rows where x is a part of a sequence that begins at token *first, read
/// when the tape runs.
void rope(Tape& tape, Var x, Tensor cos_sin, const int64_t* first = nullptr);
/// Writes cosines, then sines, of position * theta^(-2j/D) for each position (row) of cos_sin [N,
/// D].
void rope_table(Tensor cos_sin, double theta);

/// silu(gate) * up of gate_up [T, 2 f].
Var swiglu(Tape& tape, Var gate_up);

/// The head's cross-entropy: writes loss [T], in nats, of targets i32 [T] under softmax(x w^T).
/// When training, the gradients of scale * sum(loss) are computed along the way, while the logits
/// are there. predicted i32 [T], where given, gets the most likely id, the lowest of equal ones.
void head_loss(Tape& tape, Var x, Var w, Tensor targets, double scale, Tensor loss,
               Tensor predicted = {});

}  // namespace entrain::ops
