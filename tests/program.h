#pragma once
// Runs a command line as a user would: what it printed, how it ended, and signals on the way.
#include <fcntl.h>
#include <pty.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

#include "tests/temp_dir.h"

namespace entrain {

struct Ended {
  int code;  // exit code, or 128 + the signal that ended it, as shells say
  std::string out, err;

  /// The lines of err that the program itself wrote: launchers add their own.
  std::vector<std::string> errors() const {
    std::vector<std::string> lines;
    std::istringstream in(err);
    for (std::string line; std::getline(in, line);) {
      if (line.starts_with("entrain: ")) lines.push_back(line);
    }
    return lines;
  }
};

class Program {
 public:
  /// Starts a line of bash, with standard output and error going to files.
  explicit Program(const std::string& line) {
    pid_ = ::fork();
    if (pid_ != 0) return;
    ::setpgid(0, 0);
    for (const auto& [descriptor, path] : {std::pair{1, files_ / "out"}, {2, files_ / "err"}}) {
      ::dup2(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600), descriptor);
    }
    ::execlp("bash", "bash", "-c", line.c_str(), nullptr);
    ::_exit(127);
  }
  ~Program() {
    if (pid_ > 0) kill_all(), wait();
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  void signal(int number) { ::kill(pid_, number); }

  /// SIGKILL, to those it started before itself.
  void kill_all() {
    const std::vector<pid_t> children = descendants();
    for (const pid_t child : children) ::kill(child, SIGKILL);
    if (children.empty()) ::kill(pid_, SIGKILL);
  }

  /// Processes it started, and those that they started.
  std::vector<pid_t> descendants() const {
    std::vector<std::pair<pid_t, pid_t>> all;  // parent, process
    for (const auto& entry : std::filesystem::directory_iterator("/proc")) {
      const pid_t pid = std::atoi(entry.path().filename().c_str());
      std::ifstream stat(entry.path() / "stat");
      std::string line;
      if (pid == 0 || !std::getline(stat, line)) continue;
      char state = 0;
      pid_t parent = 0;
      std::istringstream(line.substr(line.rfind(')') + 1)) >> state >> parent;
      if (state != 'Z') all.emplace_back(parent, pid);
    }
    std::vector<pid_t> found{pid_};
    for (size_t i = 0; i < found.size(); ++i) {
      for (const auto& [parent, pid] : all) {
        if (parent == found[i]) found.push_back(pid);
      }
    }
    found.erase(found.begin());
    return found;
  }

  Ended wait() {
    int status = 0;
    ::waitpid(pid_, &status, 0);
    pid_ = -1;
    const int code = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    return {code, read_file(files_ / "out"), read_file(files_ / "err")};
  }

 private:
  TempDir files_;
  pid_t pid_;
};

/// Runs the program itself.
inline Ended run_entrain(const std::string& arguments) {
  return Program("exec " ENTRAIN_BINARY " " + arguments).wait();
}

/// What a line of bash shows on a terminal.
inline std::string shown_on_terminal(const std::string& line) {
  int screen = -1;
  const pid_t pid = ::forkpty(&screen, nullptr, nullptr, nullptr);
  if (pid == 0) {
    ::execlp("bash", "bash", "-c", line.c_str(), nullptr);
    ::_exit(127);
  }
  std::string shown;
  char part[4096];
  for (ssize_t n; (n = ::read(screen, part, sizeof part)) > 0;) {
    shown.append(part, static_cast<size_t>(n));
  }
  ::close(screen);
  ::waitpid(pid, nullptr, 0);
  return shown;
}

}  // namespace entrain
