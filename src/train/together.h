#pragma once
// Errors that any rank can meet before training: all ranks hear of them and one reports.
#include <functional>

#include "core/error.h"
#include "dist/comm.h"

namespace entrain {

/// What ranks other than 0 throw when rank 0 reports for them; main() prints nothing for it.
struct ReportedElsewhere : Error {
  ReportedElsewhere(const std::string& message, bool refused) : Error(message), refused(refused) {}
  bool refused;  // the configuration was at fault (ConfigError)
};

/// Runs f on every rank. Where it throws Error on any, throws on all: rank 0 the message of the
/// first rank that failed (a ConfigError or OutOfMemory where it was one), the others
/// ReportedElsewhere.
void together(Comm& comm, const std::function<void()>& f);

}  // namespace entrain
