#include "train/together.h"

#include <algorithm>
#include <cstring>

#include "train/config.h"

namespace entrain {

void together(Comm& comm, const std::function<void()>& f) {
  struct Report {
    char message[2048] = {};
    bool refused = false;
  } report;
  bool failed = false;
  auto note = [&](const std::runtime_error& error, bool refused) {
    failed = true;
    std::strncpy(report.message, error.what(), sizeof report.message - 1);
    report.refused = refused;
  };
  try {
    f();
  } catch (const ConfigError& error) {
    note(error, true);
  } catch (const std::runtime_error& error) {  // Error or filesystem_error
    note(error, false);
  }
  double first = failed ? comm.size() - comm.rank() : 0;  // largest for the lowest rank
  comm.max(&first, 1);
  if (first == 0) return;
  comm.fail_together();
  const int root = comm.size() - static_cast<int>(first);
  comm.broadcast(&report, sizeof report, root);
  std::string message = report.message;
  if (root != 0) message = fmt::format("rank {}: {}", root, message);
  if (comm.rank() != 0) throw ReportedElsewhere(message, report.refused);
  if (report.refused) throw ConfigError(message);
  throw Error(message);
}

}  // namespace entrain
