#pragma once
// One exception type for everything a user can cause or mend. main() prints what() as one line.
#include <fmt/format.h>

#include <stdexcept>
#include <string>

namespace entrain {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// More memory was asked for than there is. main() adds what the command can do with less.
struct OutOfMemory : Error {
  using Error::Error;
};

/// Throws Error with a message formatted as by fmt::format. Say what is wrong and what to do.
template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

/// fail(...) unless ok.
template <class... Args>
void require(bool ok, fmt::format_string<Args...> format, Args&&... args) {
  if (!ok) fail(format, std::forward<Args>(args)...);
}

}  // namespace entrain
