#pragma once
// What tests under mpirun share: every rank runs the same tests.
#include "dist/comm.h"

namespace entrain {

/// The communicator of this run.
Comm& world();

}  // namespace entrain
