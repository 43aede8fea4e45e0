// The step allocates nothing after the first, nor does decoding of a token. Counting is global:
// operator new is replaced for the whole test program.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>

#include "model/generator.h"
#include "tests/tiny_decoder.h"
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

// What grows with the context does so by doubling.
TEST(Decoding, AllocatesHardlyEver) {
  const Threads two(2);
  for (const char* method : {"full", "dash", "nsa", "infllmv2"}) {
    TinyDecoder tiny(method, DType::f32, 1, 1024);
    Generator generator(tiny.decoder, 1024);
    const std::span<const int32_t> ids(tiny.tokens.ptr<int32_t>(), 1024);
    generator.append(ids.first(512));
    const int64_t before = allocations;
    for (size_t t = 512; t < 1024; ++t) generator.append(ids.subspan(t, 1));
    EXPECT_LE(allocations - before, 2 * 6) << method;  // vectors of each thread
  }
}

TEST(Step, TheCounterCounts) {
  const int64_t before = allocations;
  ::operator delete(::operator new(8));
  EXPECT_EQ(allocations - before, 1);
}

}  // namespace
}  // namespace entrain
