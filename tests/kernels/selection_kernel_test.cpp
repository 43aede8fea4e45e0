#include "tests/kernels/gpu.h"

namespace entrain {
namespace {

constexpr BlockScore sum = BlockScore::sum;

struct Case {
  int64_t B, Hq, Hkv, N, D;
  BlockSelection selection;
  int64_t first = 0;  // the token that the first query is
};
// Groups of 1 to 16, both scores, few and many blocks, forced blocks beyond topk, windows in
// panels, queries that see no window.
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
    {1, 4, 2, 5, 64, {.block = 16, .topk = 4, .length = 8, .stride = 4}, 203},
    {2, 4, 2, 1, 64, {.block = 16, .topk = 4, .length = 8, .stride = 4, .score = sum}, 3},
};

bool same_as_cpu(Twin& twin) {
  return std::memcmp(twin.fetch().data, twin.cpu.data, twin.cpu.bytes()) == 0;
}

/// What both choose, the GPU from q and keys of these types, and what they count.
void expect_same_choice(const Case& c, DType real, DType of_keys) {
  const int64_t W = c.selection.windows(c.first + c.N);
  const int64_t M = (c.first + c.N + c.selection.block - 1) / c.selection.block;
  const Twin q = Twin::normal({c.B, c.N, c.Hq * c.D}, real, 1);
  const Twin keys = Twin::normal({c.B, c.Hkv, W + 1, c.D}, of_keys, 2, 0.7);
  Twin mask({c.B, c.Hkv, c.N, (M + 63) / 64 + 1}, DType::u64);
  Twin read({c.Hkv, read_fields}, DType::f64);
  on_cpu.select_blocks(q.cpu.split(2, c.D).transpose(1, 2), keys.cpu.slice(2, 0, W), c.selection,
                       {.block = c.selection.block, .mask = mask.cpu, .first = c.first}, read.cpu);
  on_gpu.select_blocks(q.gpu.split(2, c.D).transpose(1, 2), keys.gpu.slice(2, 0, W), c.selection,
                       {.block = c.selection.block, .mask = mask.gpu, .first = c.first}, read.gpu);
  EXPECT_TRUE(same_as_cpu(mask));
  EXPECT_TRUE(same_as_cpu(read));

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

// Where all windows weigh the same, and where nothing is a number, the first blocks are taken.
TEST(SelectionOnGpu, EqualScoresGoToTheLowerBlock) {
  NEEDS_GPU();
  const BlockSelection selection{
      .block = 8, .topk = 4, .init_blocks = 0, .local_blocks = 1, .length = 4, .stride = 4};
  const int64_t N = 80, D = 16;
  for (const double value : {0.0, std::numeric_limits<double>::quiet_NaN()}) {
    Twin q = Twin::zeros({1, 2, N, D}, DType::f32);
    std::fill_n(q.cpu.ptr<double>(), q.cpu.numel(), value);
    q.send();
    const Twin keys = Twin::normal({1, 1, selection.windows(N), D}, DType::f64, 1);
    Twin mask({1, 1, N, 1}, DType::u64);
    on_gpu.select_blocks(q.gpu, keys.gpu, selection, {.block = 8, .mask = mask.gpu}, {});
    EXPECT_EQ(mask.fetch().ptr<uint64_t>()[N - 1], uint64_t{0b1000000111});
  }
}

}  // namespace
}  // namespace entrain
