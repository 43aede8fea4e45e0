#pragma once
// A polite end: the first SIGTERM or SIGINT asks the run to stop, the second ends it.
#include "dist/comm.h"

namespace entrain {

/// From now on the first SIGTERM, SIGINT or SIGUSR1 only sets stop_requested(); one more ends the
/// process at once with code 128 + signal. SIGUSR1 is for Open MPI's mpirun, which passes it on to
/// all ranks and waits; told SIGTERM or SIGINT, it kills them a second after passing on SIGTERM,
/// unless started with --mca odls_base_sigkill_timeout SECONDS.
void install_signal_handlers();

/// This rank was asked to stop.
bool stop_requested();
/// Any rank was: launchers may tell some only. All ranks call it.
bool stop_requested(Comm& comm);

}  // namespace entrain
