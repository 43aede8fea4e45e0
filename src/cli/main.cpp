#include <iostream>

#include "cli/commands.h"
int main(int argc, char** argv) {
  CLI::App app("x");
  entrain::cli::add_op(app);
  try {
    CLI11_PARSE(app, argc, argv);
  } catch (const std::exception& e) {
    std::cerr << "entrain: " << e.what() << "\n";
    return 1;
  }
}
