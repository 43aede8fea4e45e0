#pragma once
// A polite end: the first SIGTERM or SIGINT asks the run to stop, the second ends it.

namespace entrain {

/// From now on the first SIGTERM or SIGINT only sets stop_requested(); one more ends the process at
/// once with code 128 + signal.
void install_signal_handlers();

/// This rank was asked to stop. Launchers may tell some ranks only: combine it over ranks.
bool stop_requested();

}  // namespace entrain
