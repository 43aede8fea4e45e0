#pragma once
// Runs the program itself.
#include <sys/wait.h>

#include <cstdio>
#include <string>

#include "tests/temp_dir.h"

namespace entrain {

struct Result {
  int code;
  std::string out, err;
};

/// Exit code and what it printed; -1 when a signal ended it.
inline Result run_entrain(const std::string& arguments) {
  const TempDir dir;
  const std::string errors = dir / "err";
  std::FILE* pipe = ::popen((ENTRAIN_BINARY " " + arguments + " 2>" + errors).c_str(), "r");
  Result result;
  for (int c; (c = std::fgetc(pipe)) != EOF;) result.out += static_cast<char>(c);
  const int status = ::pclose(pipe);
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  result.err = read_file(errors);
  return result;
}

}  // namespace entrain
