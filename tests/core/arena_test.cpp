#include "core/arena.h"

#include <gtest/gtest.h>

#include "tests/expect_error.h"

namespace entrain {
namespace {

// Allocates as a computation would; offsets from the first allocation.
std::vector<ptrdiff_t> build(Arena& arena) {
  std::vector<void*> at;
  at.push_back(arena.alloc({3}).data);
  const size_t mark = arena.mark();
  at.push_back(arena.alloc({100, 10}).data);
  at.push_back(arena.alloc({7}, DType::f64).data);
  arena.release(mark);
  at.push_back(arena.alloc({1}, DType::u8).data);
  std::vector<ptrdiff_t> offsets;
  for (void* p : at) offsets.push_back(static_cast<std::byte*>(p) - static_cast<std::byte*>(at[0]));
  return offsets;
}

TEST(Arena, CountsFirstAndHandsOutTheSameOffsetsAfterwards) {
  Arena arena(Device::cpu);
  const std::vector<ptrdiff_t> counted = build(arena);
  EXPECT_EQ(counted, (std::vector<ptrdiff_t>{0, 256, 256 + 4096, 256}));
  EXPECT_EQ(arena.peak(), 256 + 4096 + 256);
  arena.commit();
  EXPECT_EQ(build(arena), counted);
  EXPECT_EQ(arena.peak(), 256 + 4096 + 256);
}

TEST(Arena, GivesAlignedZeroedMemory) {
  Arena arena(Device::cpu);
  build(arena);
  arena.commit();
  const Tensor t = arena.alloc({1000});
  EXPECT_EQ(reinterpret_cast<uintptr_t>(t.data) % 256, 0);
  for (int64_t i = 0; i < t.numel(); ++i) EXPECT_EQ(t.ptr<float>()[i], 0);
}

TEST(Arena, RefusesMoreThanWasCounted) {
  Arena arena(Device::cpu), empty(Device::cpu);
  build(arena);
  for (Arena* a : {&arena, &empty}) {
    a->commit();
    EXPECT_EQ(a->alloc({0}).numel(), 0);
    EXPECT_ERROR(a->alloc({100, 100}), "built differently after commit()");
  }
}

TEST(Buffer, MovesItsMemoryAndNamesWhatItCannotGet) {
  Buffer a(100, Device::cpu);
  void* const data = a.data();
  const Buffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(b.bytes(), 100);
#ifndef __SANITIZE_ADDRESS__  // which ends the program instead of refusing
  EXPECT_ERROR(Buffer(size_t{1} << 60, Device::cpu), "out of memory: 1073741824.00 GiB");
#endif
}

}  // namespace
}  // namespace entrain
