#pragma once
// Ranks joined by MPI, on CPUs.
#include <memory>

#include "dist/comm.h"

namespace entrain {

/// Starts MPI (main thread only calls it). The object ends it when it is destroyed, except while an
/// exception passes that not all ranks throw: a rank that fails alone must not wait for the others,
/// and leaving without MPI_Finalize is what makes mpirun end them.
std::unique_ptr<Comm> start_mpi();

}  // namespace entrain
