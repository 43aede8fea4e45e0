#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr BlockScore sum = BlockScore::sum;

struct Case {
  int64_t B, Hq, Hkv, N, D;
  BlockSelection selection;
  int64_t first = 0;  // the token that the first query is
};
// Groups of 1 to 64, both scores, few and many blocks, forced blocks beyond topk, windows in
// panels, queries that see no window. bf16 with 64 or 128 columns and at least 64 queries is
// Hopper's.
const Case cases[] = {
    {1, 4, 2, 200, 64, {.block = 16, .topk = 5, .length = 8, .stride = 4}},
    {2, 3, 3, 130, 16, {.block = 16, .topk = 4, .length = 8, .stride = 4, .score = sum}},
    {1, 6, 2, 300, 32, {.block = 8, .topk = 6, .length = 4, .stride = 2, .score = sum}},
    {1, 16, 1, 500, 128, {.block = 16, .topk = 7, .init_blocks = 2, .length = 8, .stride = 4}},
    {1, 4, 1, 120, 36, {.block = 12, .topk = 3, .init_blocks = 2, .local_blocks = 3}},
    {1, 4, 2, 150, 64, {.block = 4, .topk = 100, .length = 4, .stride = 2}},
    {1,
     2,
     2,
     90,
     64,
     {.block = 8, .topk = 4, .init_blocks = 0, .local_blocks = 0, .length = 12, .stride = 3}},
    {1, 4, 1, 3000, 64, {.block = 4, .topk = 9, .length = 2, .stride = 1}},
    {2, 32, 2, 1500, 128, {.block = 64, .topk = 6}},
    {1, 32, 2, 1500, 64, {.block = 64, .topk = 6, .score = sum}},
    {1, 6, 2, 1000, 64, {.block = 16, .topk = 9, .length = 8, .stride = 4, .score = sum}, 77},
    {1, 3, 1, 700, 128, {.block = 12, .topk = 5, .length = 7, .stride = 5}},
    {1, 64, 1, 300, 64, {.block = 8, .topk = 6, .length = 4, .stride = 4}},
    {1, 2, 2, 6000, 128, {.block = 4, .topk = 9, .length = 4, .stride = 2, .score = sum}},
    {1, 4, 2, 5, 64, {.block = 16, .topk = 4, .length = 8, .stride = 4}, 203},
    {2, 4, 2, 1, 64, {.block = 16, .topk = 4, .length = 8, .stride = 4, .score = sum}, 3},
};

bool same_as_cpu(Twin& twin) {
  return std::memcmp(twin.fetch().data, twin.cpu.data, twin.cpu.bytes()) == 0;
}

/// The share of blocks that one mask has and the other has not; 1 where queries have not the same
/// number of them.
double differing(Twin& mask) {
  const Tensor gpu = mask.fetch();
  const int64_t words = gpu[3];
  int64_t chosen = 0, different = 0;
  for (int64_t i = 0; i < gpu.numel(); i += words) {
    int64_t on_gpu = 0, on_cpu = 0;
    for (int64_t x = i; x < i + words; ++x) {
      const uint64_t is = gpu.ptr<uint64_t>()[x], should = mask.cpu.ptr<uint64_t>()[x];
      on_gpu += std::popcount(is);
      on_cpu += std::popcount(should);
      different += std::popcount(is & ~should);
    }
    if (on_gpu != on_cpu) return 1;
    chosen += on_cpu;
  }
  return static_cast<double>(different) / static_cast<double>(std::max<int64_t>(chosen, 1));
}

/// What both choose, the GPU from q and keys of these types, and what they count. Only in float, so
/// with bf16, may blocks of nearly equal scores be taken for each other.
void expect_same_choice(const Case& c, DType real, DType of_keys) {
  const int64_t W = c.selection.windows(c.first + c.N);
  const int64_t M = (c.first + c.N + c.selection.block - 1) / c.selection.block;
  const Twin q = Twin::normal({c.B, c.N, c.Hq * c.D}, real, 1);
  const Twin keys = Twin::normal({c.B, c.Hkv, W + 1, c.D}, of_keys, 2, 0.7);
  Twin mask({c.B, c.Hkv, c.N, (M + 63) / 64 + 1}, DType::u64);
  Twin read({c.Hkv, read_fields}, DType::f64);
  const Twin scratch({on_gpu.select_scratch({c.B, c.Hkv, W + 1, c.D})}, DType::f64);
  on_cpu.select_blocks(q.cpu.split(2, c.D).transpose(1, 2), keys.cpu.slice(2, 0, W), c.selection,
                       {.block = c.selection.block, .mask = mask.cpu, .first = c.first}, {},
                       read.cpu);
  on_gpu.select_blocks(q.gpu.split(2, c.D).transpose(1, 2), keys.gpu.slice(2, 0, W), c.selection,
                       {.block = c.selection.block, .mask = mask.gpu, .first = c.first},
                       scratch.gpu, read.gpu);
  EXPECT_LE(differing(mask), real == DType::bf16 ? 1e-3 : 0);
  EXPECT_TRUE(same_as_cpu(read));
  mask.send();

  const BlockSet blocks{.block = c.selection.block, .mask = mask.cpu, .first = c.first};
  BlockSet on_device = blocks;
  on_device.mask = mask.gpu;
  on_cpu.read_window(blocks, 3 * c.selection.block + 1, read.cpu);
  on_gpu.read_window(on_device, 3 * c.selection.block + 1, read.gpu);
  EXPECT_TRUE(same_as_cpu(read));
}

TEST(SelectionOnGpu, ChoosesAsTheCpuDoes) {
  NEEDS_GPU();
  for (const DType real : {DType::f32, DType::bf16}) {
    for (const DType of_keys : {DType::f64, real}) {
      for (const Case& c : cases) {
        SCOPED_TRACE(std::to_string(&c - cases) + " " + name_of(real) + " " + name_of(of_keys));
        expect_same_choice(c, real, of_keys);
      }
    }
  }
}

// Where all windows weigh the same, and where nothing is a number, the first blocks are taken; in
// double and, with bf16, in float.
TEST(SelectionOnGpu, EqualScoresGoToTheLowerBlock) {
  NEEDS_GPU();
  const BlockSelection selection{
      .block = 8, .topk = 4, .init_blocks = 0, .local_blocks = 1, .length = 4, .stride = 4};
  const int64_t N = 80, D = 64, W = selection.windows(N);
  for (const DType real : {DType::f32, DType::bf16}) {
    for (const DType of_keys : {DType::f64, real}) {
      for (const double value : {0.0, std::numeric_limits<double>::quiet_NaN()}) {
        SCOPED_TRACE(name_of(real) + std::string(" ") + name_of(of_keys));
        const Twin q = Twin::constant({1, 2, N, D}, real, value);
        const Twin keys = Twin::normal({1, 1, W, D}, of_keys, 1);
        const Twin scratch({on_gpu.select_scratch({1, 1, W, D})}, DType::f64);
        Twin mask({1, 1, N, 1}, DType::u64);
        on_gpu.select_blocks(q.gpu, keys.gpu, selection, {.block = 8, .mask = mask.gpu},
                             scratch.gpu, {});
        EXPECT_EQ(mask.fetch().ptr<uint64_t>()[N - 1], uint64_t{0b1000000111});
      }
    }
  }
}

// Any number of times, to the same bits.
TEST(SelectionOnGpu, ChoosesTheSameAgain) {
  NEEDS_GPU();
  const BlockSelection selection{.block = 64, .topk = 8};
  const int64_t N = 4000, D = 128, W = selection.windows(N);
  const Twin q = Twin::normal({1, 8, N, D}, DType::bf16, 1);
  const Twin keys = Twin::normal({1, 2, W, D}, DType::f64, 2);
  const Twin scratch({on_gpu.select_scratch({1, 2, W, D})}, DType::f64);
  std::vector<uint64_t> first;
  for (int time = 0; time < 5; ++time) {
    Twin mask({1, 2, N, 1}, DType::u64);
    on_gpu.select_blocks(q.gpu, keys.gpu, selection, {.mask = mask.gpu}, scratch.gpu, {});
    const uint64_t* bits = mask.fetch().ptr<uint64_t>();
    if (time == 0) first.assign(bits, bits + 2 * N);
    EXPECT_TRUE(std::equal(first.begin(), first.end(), bits));
  }
}

}  // namespace
}  // namespace entrain
