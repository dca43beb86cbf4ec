// The attention of one new token in each of several rows, every row with a KV cache of its own, on a CPU.
//
// Linear layers multiply all rows at once; attention cannot, as caches differ in length and place. A row's result does
// not depend on the other rows. llm/inference/rows.py has the plain formula.
//
// Shapes: M rows, B of them with a cache, H query heads, K key-value heads, D head_dim, S tokens that a row sees.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

using torch::stable::Tensor;

namespace {

struct Row {            // of the table, as rows.py writes it
  int64_t keys, values;  // addresses of the cache's first number of this row
  int64_t layer_stride, head_stride;  // numbers from a layer, and from a head, to the next
  int64_t begin, end;   // tokens seen: the new one is written behind the last, at `end`
};

// e^x for x <= 0, to 2e-7 of the value: Cephes' polynomial. A loop of it becomes vector code, one of std::exp does not.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const int32_t bits = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return (p * r * r + r + 1.0f) * power;
}

// q and y [G, D]; keys and values [S, D]; weights is room for S numbers of each query. KNOWN is D where the compiler knows
// it, for which it unrolls the loops, or 0.
template <int64_t KNOWN>
void attend(const float* q, const float* keys, const float* values, float* weights, float* y, int64_t G, int64_t S,
            int64_t head_dim) {
  const int64_t D = KNOWN ? KNOWN : head_dim;
  const float scale = 1 / std::sqrt((float)D);
  for (int64_t g = 0; g < G; g++)
    for (int64_t s = 0; s < S; s++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; d++) sum += q[g * D + d] * keys[s * D + d];
      weights[g * S + s] = scale * sum;
    }
  for (int64_t g = 0; g < G; g++) {
    float* own = weights + g * S;
    float largest = own[0], total = 0;
#pragma omp simd reduction(max : largest)
    for (int64_t s = 0; s < S; s++) largest = own[s] > largest ? own[s] : largest;
#pragma omp simd reduction(+ : total)
    for (int64_t s = 0; s < S; s++) {
      own[s] = exponential(own[s] - largest);
      total += own[s];
    }
    const float inverse = 1 / total;
    for (int64_t s = 0; s < S; s++) own[s] *= inverse;
  }
  for (int64_t g = 0; g < G; g++) {
    float sums[KNOWN ? KNOWN : 1] = {}, *to = KNOWN ? sums : y + g * D;
    if (!KNOWN) std::memset(to, 0, D * sizeof(float));
    for (int64_t s = 0; s < S; s++) {
      const float weight = weights[g * S + s];
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] += weight * values[s * D + d];
    }
    if (KNOWN) std::memcpy(y + g * D, sums, D * sizeof(float));
  }
}

// q [M, H, D], k and v [M, K, D] fp32, table [B, 6] int64, to the attention output [M, H * D]. The keys and values of
// the first B rows go to their caches; the output of the others is zero. `index` is the layer's; of each layer, `windows`
// says how many tokens a row sees, or 0.
Tensor attend_rows(Tensor q, Tensor k, Tensor v, Tensor table, Tensor windows, Tensor index) {
  const int64_t layer = *(const int64_t*)index.data_ptr(), window = ((const int64_t*)windows.data_ptr())[layer];
  const int64_t M = q.size(0), H = q.size(1), D = q.size(2), K = k.size(1), B = table.size(0), G = H / K;
  Tensor y = torch::stable::new_empty(q, {M, H * D});
  const auto *queries = (const float*)q.data_ptr(), *new_keys = (const float*)k.data_ptr();
  const auto *new_values = (const float*)v.data_ptr();
  const auto* rows = (const Row*)table.data_ptr();
  auto* results = (float*)y.data_ptr();
#pragma omp parallel
  {
    std::vector<float> weights;
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < B * K; task++) {
      const int64_t b = task / K, head = task % K;
      const Row& row = rows[b];
      const int64_t place = layer * row.layer_stride + head * row.head_stride, S = row.end + 1;
      float *keys = (float*)row.keys + place, *values = (float*)row.values + place;
      std::memcpy(keys + row.end * D, new_keys + task * D, D * sizeof(float));
      std::memcpy(values + row.end * D, new_values + task * D, D * sizeof(float));
      const int64_t begin = window > 0 && S - window > row.begin ? S - window : row.begin;
      weights.resize(G * (S - begin));
      const int64_t first = (b * H + head * G) * D;
      const auto compute = D == 64 ? attend<64> : D == 128 ? attend<128> : attend<0>;
      compute(queries + first, keys + begin * D, values + begin * D, weights.data(), results + first, G, S - begin, D);
    }
  }
  std::memset(results + B * H * D, 0, (M - B) * H * D * sizeof(float));
  return y;
}

}  // namespace

#define REGISTER(ns)                                                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(ns, library) {                                                             \
    library.def("attend_rows(Tensor q, Tensor k, Tensor v, Tensor table, Tensor windows, Tensor layer) -> Tensor"); \
  }                                                                                                        \
  STABLE_TORCH_LIBRARY_IMPL(ns, CPU, library) { library.impl("attend_rows", TORCH_BOX(&attend_rows)); }
REGISTER(LIBRARY)
