#include "tests/mpi_main.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <iostream>

#include "train/config.h"
#include "train/device.h"

namespace entrain {
namespace {

Comm* the_world = nullptr;

// Ranks other than 0 speak only of failures.
class Failures : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::cerr << "rank " << world().rank() << ": " << result.file_name() << ":"
              << result.line_number() << ": " << result.message() << std::endl;
  }
};

int run_tests() {
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  if (world().rank() != 0) {
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new Failures);
  }
  double failed = RUN_ALL_TESTS();
  world().max(&failed, 1);
  return failed != 0;
}

}  // namespace

Comm& world() {
  return *the_world;
}

}  // namespace entrain

int main(int argc, char** argv) try {
  testing::InitGoogleTest(&argc, argv);
  const char* device = std::getenv("TEST_DEVICE");
  const auto comm = entrain::place_ranks(device ? device : "cpu", entrain::make_comm());
  entrain::the_world = comm.get();
  return entrain::run_tests();
} catch (const entrain::ConfigError& error) {
  std::cerr << error.what() << std::endl;
  return 77;  // skipped: too few GPUs
} catch (const entrain::Error& error) {
  std::cerr << error.what() << std::endl;
  return 1;
}
