#include "train/machine.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace entrain {
namespace {

constexpr size_t size = 64 << 20;

// Holds that much memory for a moment.
void hold() {
  void* memory = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  std::memset(memory, 1, size);
  ::munmap(memory, size);
}

TEST(Machine, PeakMemoryIsThatSinceItsReset) {
  const size_t before = resident_bytes();
  hold();
  EXPECT_GE(peak_resident_bytes(), before + size * 9 / 10);
  reset_peak_resident();
  if (::access("/proc/self/clear_refs", W_OK) != 0) GTEST_SKIP() << "the system grants no reset";
  EXPECT_LT(peak_resident_bytes(), before + size / 2);
  hold();
  EXPECT_GE(peak_resident_bytes(), resident_bytes() + size * 9 / 10);
}

}  // namespace
}  // namespace entrain
