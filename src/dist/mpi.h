#pragma once
// Ranks joined by MPI, on CPUs.
#include <memory>

#include "dist/comm.h"

namespace entrain {

/// Starts MPI (main thread only calls it). The object ends it when it is destroyed, except while an
/// exception passes. A rank that fails alone must not wait for the others, and leaving without
/// MPI_Finalize is what makes mpirun end them; where all fail, leave_mpi() ends it.
std::unique_ptr<Comm> start_mpi();

/// Before the program ends: where all ranks fail, waits for the others. The first one to leave
/// makes mpirun end the rest, of which one has yet to say why.
void leave_mpi();

}  // namespace entrain
