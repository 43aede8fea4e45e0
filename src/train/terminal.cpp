#include "train/terminal.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

namespace entrain {
namespace {

namespace fs = std::filesystem;

// 0 when there is none to see.
pid_t parent_of(pid_t process) {
  std::ifstream status(fmt::format("/proc/{}/status", process));
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("PPid:")) return std::atoi(line.c_str() + 5);
  }
  return 0;
}

bool leads_to_terminal(const fs::path& path) {
  const int file = ::open(path.c_str(), O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
  const bool terminal = file >= 0 && ::isatty(file) != 0;
  if (file >= 0) ::close(file);
  return terminal;
}

}  // namespace

// Open MPI gives every rank a terminal of its own and passes on what is written there. What counts
// is where mpirun itself writes: the nearest ancestor with another standard output.
bool is_terminal(std::FILE* out) {
  if (::isatty(::fileno(out)) == 0) return false;
  if (!std::getenv("OMPI_COMM_WORLD_SIZE")) return true;
  std::error_code error;
  const fs::path own = fs::read_symlink(fmt::format("/proc/self/fd/{}", ::fileno(out)), error);
  for (pid_t process = ::getppid(); process > 0; process = parent_of(process)) {
    const fs::path descriptor = fmt::format("/proc/{}/fd/1", process);
    const fs::path target = fs::read_symlink(descriptor, error);
    if (error) return false;
    if (target != own) return leads_to_terminal(descriptor);
  }
  return false;
}

Screen screen_size(std::FILE* out) {
  winsize size{};
  const bool known = ::ioctl(::fileno(out), TIOCGWINSZ, &size) == 0 && size.ws_col > 0;
  return known ? Screen{size.ws_row, size.ws_col} : Screen{24, 80};
}

}  // namespace entrain
