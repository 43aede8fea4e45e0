#pragma once
// AdamW (Loshchilov and Hutter 2019) over all parameters, with clipping of the global gradient
// norm.
#include "core/params.h"
#include "optim/config.h"

namespace entrain {

/// The norm of all gradients together.
double grad_norm(const Params& params);

/// Step number `step` (from 1) at this learning rate; clips to config.clip and clears the
/// gradients.
void adamw_step(Params& params, const OptimConfig& config, int64_t step, double lr, double norm);

}  // namespace entrain
