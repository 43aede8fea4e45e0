#include "train/together.h"

#include <algorithm>
#include <cstring>
#include <new>

#include "train/config.h"

namespace entrain {

void together(Comm& comm, const std::function<void()>& f) {
  enum class Kind : uint8_t { error, refused, memory };
  struct Report {
    char message[2048] = {};
    Kind kind = Kind::error;
  } report;
  bool failed = false;
  auto note = [&](const char* message, Kind kind) {
    failed = true;
    std::strncpy(report.message, message, sizeof report.message - 1);
    report.kind = kind;
  };
  try {
    f();
  } catch (const ConfigError& error) {
    note(error.what(), Kind::refused);
  } catch (const OutOfMemory& error) {
    note(error.what(), Kind::memory);
  } catch (const std::bad_alloc&) {
    note("out of memory", Kind::memory);
  } catch (const std::runtime_error& error) {  // Error or filesystem_error
    note(error.what(), Kind::error);
  }
  double first = failed ? comm.size() - comm.rank() : 0;  // largest for the lowest rank
  comm.max(&first, 1);
  if (first == 0) return;
  comm.fail_together();
  const int root = comm.size() - static_cast<int>(first);
  comm.broadcast(&report, sizeof report, root);
  std::string message = report.message;
  if (root != 0) message = fmt::format("rank {}: {}", root, message);
  const bool refused = report.kind == Kind::refused;
  if (comm.rank() != 0) throw ReportedElsewhere(message, refused);
  if (refused) throw ConfigError(message);
  if (report.kind == Kind::memory) throw OutOfMemory(message);
  throw Error(message);
}

}  // namespace entrain
