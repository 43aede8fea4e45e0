// Rotary positions (Su et al. 2021) in Hugging Face's half-split convention: elements j and j + D/2
// of a head turn by position * theta^(-2j/D).
//
// A block takes a few tokens, its threads a pack of 16 bytes of a head's lower half and its partner
// of the upper half. Heads of a token are adjacent, so a warp's accesses are whole lines; cosines
// and sines, shared by heads, come from the caches. x is read and written once.
#include "kernels/cuda/common.cuh"

namespace entrain {
namespace {

using namespace cuda;

template <class T, int n>
__global__ void rotate(Rows<T> x, const Pack<float, n>* cos_sin, float direction, int64_t tokens,
                       int64_t N, int heads, int half) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (token >= tokens) return;
  const int64_t b = token / N, i = token % N;
  const Pack<float, n>* cosine = cos_sin + i * 2 * half;
  const Pack<float, n>* sine = cosine + half;
  for (int c = threadIdx.x; c < heads * half; c += blockDim.x) {
    const int h = c / half, j = c % half;
    auto* low = reinterpret_cast<Pack<T, n>*>(x.at(b, h, i)) + j;
    auto* high = low + half;
    Pack<T, n> a = *low, z = *high;
    const Pack<float, n> cosines = cosine[j], sines = sine[j];
    for (int e = 0; e < n; ++e) {
      const float s = direction * sines.at[e], u = to_float(a.at[e]), v = to_float(z.at[e]);
      a.at[e] = from_float<T>(u * cosines.at[e] - v * s);
      z.at[e] = from_float<T>(v * cosines.at[e] + u * s);
    }
    *low = a;
    *high = z;
  }
}

}  // namespace

template <>
void Kernels<Device::cuda>::rope(Tensor x, Tensor cos_sin, bool inverse) const {
  if (x.numel() == 0) return;
  const int64_t tokens = x[0] * x[2], D = x[3];
  by_type(x, [&]<class T>(T) {
    // A half of each head is what packs must fill.
    by_pack<T>(
        {x.slice(3, 0, D / 2), cos_sin.slice(1, 0, D / 2)},
        [&]<int n>(std::integral_constant<int, n>) {
          const int64_t half = D / 2 / n, items = x[1] * half;  // of a token
          const int64_t rounds = ceil_div(items, 256), threads = ceil_div(items, rounds);
          const dim3 block(static_cast<unsigned>(threads), static_cast<unsigned>(256 / threads));
          rotate<T, n><<<static_cast<unsigned>(ceil_div(tokens, block.y)), block, 0, stream()>>>(
              Rows<T>(x), packs<float, n>(cos_sin), inverse ? -1.f : 1.f, tokens, x[2],
              static_cast<int>(x[1]), static_cast<int>(half));
        });
  });
  check_launch("rope");
}

}  // namespace entrain
