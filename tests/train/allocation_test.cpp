// The step allocates nothing after the first. Counting is global: operator new is replaced for the
// whole test program.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "tests/train/tiny_step.h"

namespace {

std::atomic<int64_t> allocations = 0;

}  // namespace

void* operator new(size_t bytes) {
  ++allocations;
  if (void* p = std::malloc(bytes > 0 ? bytes : 1)) return p;
  throw std::bad_alloc();
}

// std::stable_sort takes its buffer here; every new must match the delete below.
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  ++allocations;
  return std::malloc(bytes > 0 ? bytes : 1);
}

void operator delete(void* p) noexcept {
  std::free(p);
}

void operator delete(void* p, size_t) noexcept {
  std::free(p);
}

namespace entrain {
namespace {

// Batches of two micro-batches, shapes and paths too long for strings without an allocation.
TEST(Step, AllocatesNothingAfterTheFirst) {
  for (const char* method : {"full", "dash", "nsa", "infllmv2"}) {
    for (const bool recompute : {false, true}) {
      TinyStep tiny(method, recompute);
      tiny.run(1);
      for (const int number : {2, 3}) {
        const int64_t before = allocations;
        tiny.run(number);
        EXPECT_EQ(allocations - before, 0) << method << number;
      }
    }
  }
}

TEST(Step, TheCounterCounts) {
  const int64_t before = allocations;
  ::operator delete(::operator new(8));
  EXPECT_EQ(allocations - before, 1);
}

}  // namespace
}  // namespace entrain
