// Attention on a CPU: of one new token in each of several rows, every row with a KV cache of its own, and of prompts.
//
// Linear layers multiply all rows at once; attention cannot, as caches differ in length and place. A row's result does
// not depend on the other rows, nor a token's of a prompt on the later ones. llm/inference/rows.py and the model's
// `attend` have the plain formulas.
//
// Shapes: M rows, B of them with a cache, H query heads, K key-value heads, D head_dim, S tokens that a row sees, E bytes
// of a stored key or value. In prompts: T tokens behind S - T earlier ones.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "vectors.h"

using torch::stable::Tensor;

namespace {

constexpr float SMALLEST = 1e-30f;  // a vector without a larger number is stored as zero
constexpr float UNSEEN = -3e38f;    // the score of a token that is not seen
constexpr int64_t PART = 128;       // tokens of a row that one core attends to at once
constexpr int64_t QUERIES = 32;     // of a prompt that are computed together

struct Row {            // of the table, as rows.py writes it
  int64_t keys, values;  // addresses of the cache's first byte of this row
  int64_t layer_stride, head_stride;  // bytes from a layer, and from a head, to the next
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

// ---- a cache in fp32, or in 8 bits as llm/model/kv_cache.py stores it: int8 numbers, and their scale in the last 4 bytes

inline int64_t stored_bytes(bool int8, int64_t D) { return int8 ? (D + 3) / 4 * 4 + (int64_t)sizeof(float) : 4 * D; }

inline float scale_of(const float*, int64_t) { return 1; }
inline float scale_of(const int8_t* numbers, int64_t E) {
  float scale;
  std::memcpy(&scale, numbers + E - sizeof scale, sizeof scale);
  return scale;
}

inline void store_vector(float* to, const float* from, int64_t D, int64_t) { std::memcpy(to, from, D * sizeof(float)); }
inline void store_vector(int8_t* to, const float* from, int64_t D, int64_t E) {
  float largest = 0;
  for (int64_t d = 0; d < D; d++) largest = std::fabs(from[d]) > largest ? std::fabs(from[d]) : largest;
  const float scale = largest > SMALLEST ? largest / 127 : 1;
  for (int64_t d = 0; d < D; d++) to[d] = (int8_t)std::nearbyint(from[d] / scale);
  std::memcpy(to + E - sizeof scale, &scale, sizeof scale);
}

// ---- attention -------------------------------------------------------------------------------------------------------

// q [G, D]; keys and values [S, E]; weights is room for S numbers of each query. y [G, D] is the sum of the values, each
// times e^(score - largest score), whose sum is `total` [G]. KNOWN is D where the compiler knows it, for which it unrolls
// the loops, or 0.
template <typename Number, int64_t KNOWN>
void attend(const float* q, const char* keys, const char* values, float* weights, float* y, float* largest, float* total,
            int64_t G, int64_t S, int64_t head_dim, int64_t E) {
  const int64_t D = KNOWN ? KNOWN : head_dim;
  const float scale = 1 / std::sqrt((float)D);
  for (int64_t s = 0; s < S; s++) {
    const auto* key = (const Number*)(keys + s * E);
    for (int64_t g = 0; g < G; g++) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t d = 0; d < D; d++) sum += q[g * D + d] * key[d];
      weights[g * S + s] = scale * sum * scale_of(key, E);
    }
  }
  for (int64_t g = 0; g < G; g++) {
    float *own = weights + g * S, most = own[0], all = 0;
#pragma omp simd reduction(max : most)
    for (int64_t s = 0; s < S; s++) most = own[s] > most ? own[s] : most;
#pragma omp simd reduction(+ : all)
    for (int64_t s = 0; s < S; s++) {
      own[s] = exponential(own[s] - most);
      all += own[s];
    }
    largest[g] = most, total[g] = all;
  }
  for (int64_t g = 0; g < G; g++) {
    float sums[KNOWN ? KNOWN : 1] = {}, *to = KNOWN ? sums : y + g * D;
    if (!KNOWN) std::memset(to, 0, D * sizeof(float));
    for (int64_t s = 0; s < S; s++) {
      const auto* value = (const Number*)(values + s * E);
      const float weight = weights[g * S + s] * scale_of(value, E);
#pragma omp simd
      for (int64_t d = 0; d < D; d++) to[d] += weight * value[d];
    }
    if (KNOWN) std::memcpy(y + g * D, sums, D * sizeof(float));
  }
}

// The attention output y [D] of a query, from those of parts of its tokens as `attend` leaves them, `stride` apart.
void join_parts(const float* parts, const float* largest, const float* total, int64_t count, int64_t stride, int64_t D,
                float* y) {
  float most = largest[0], all = 0;
  for (int64_t i = 1; i < count; i++) most = std::max(most, largest[i * stride]);
  std::memset(y, 0, D * sizeof(float));
  for (int64_t i = 0; i < count; i++) {
    const float weight = exponential(largest[i * stride] - most);
    all += weight * total[i * stride];
    for (int64_t d = 0; d < D; d++) y[d] += weight * parts[i * stride * D + d];
  }
  for (int64_t d = 0; d < D; d++) y[d] /= all;
}

template <typename Number>
auto attend_with(int64_t D) {
  return D == 64 ? attend<Number, 64> : D == 128 ? attend<Number, 128> : attend<Number, 0>;
}

template <typename Number>
void store(char* keys, char* values, const float* k, const float* v, int64_t D, int64_t E) {
  store_vector((Number*)keys, k, D, E);
  store_vector((Number*)values, v, D, E);
}

// q [M, H, D], k and v [M, K, D] fp32, table [B, 6] int64, to the attention output [M, H * D]. The keys and values of
// the first B rows go to their caches, all before any row is computed: several rows may be tokens of one cache. The
// output of the other rows is zero. `index` is the layer's; of each layer, `windows` says how many tokens a row sees, or 0.
Tensor attend_rows(Tensor q, Tensor k, Tensor v, Tensor table, Tensor windows, Tensor index, bool int8) {
  const int64_t layer = *(const int64_t*)index.data_ptr(), window = ((const int64_t*)windows.data_ptr())[layer];
  const int64_t M = q.size(0), H = q.size(1), D = q.size(2), K = k.size(1), B = table.size(0), G = H / K;
  Tensor y = torch::stable::new_empty(q, {M, H * D});
  const auto *queries = (const float*)q.data_ptr(), *new_keys = (const float*)k.data_ptr();
  const auto *new_values = (const float*)v.data_ptr();
  const auto* rows = (const Row*)table.data_ptr();
  auto* results = (float*)y.data_ptr();
  const int64_t E = stored_bytes(int8, D);
  const auto compute = int8 ? attend_with<int8_t>(D) : attend_with<float>(D);
  const auto store_new = int8 ? store<int8_t> : store<float>;
  // A row's tokens are cut into parts, so that few heads keep all cores busy; where, depends on that row alone.
  std::vector<int64_t> begins(B), first_part(B + 1, 0);
  for (int64_t b = 0; b < B; b++) {
    const int64_t S = rows[b].end + 1;
    begins[b] = window > 0 && S - window > rows[b].begin ? S - window : rows[b].begin;
    first_part[b + 1] = first_part[b] + (S - begins[b] + PART - 1) / PART;
  }
  const int64_t parts = first_part[B];
  std::vector<int64_t> row_of(parts);
  for (int64_t b = 0; b < B; b++) std::fill(row_of.begin() + first_part[b], row_of.begin() + first_part[b + 1], b);
  std::vector<float> sums(parts * H * D), largest(parts * H), totals(parts * H);  // [part, H, D], 2 x [part, H]
#pragma omp parallel
  {
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * K; task++) {
      const Row& row = rows[task / K];
      const int64_t place = layer * row.layer_stride + task % K * row.head_stride + row.end * E;
      store_new((char*)row.keys + place, (char*)row.values + place, new_keys + task * D, new_values + task * D, D, E);
    }
    std::vector<float> weights(G * PART);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < parts * K; task++) {
      const int64_t part = task / K, head = task % K, b = row_of[part];
      const Row& row = rows[b];
      const int64_t begin = begins[b] + (part - first_part[b]) * PART, end = std::min(begin + PART, row.end + 1);
      const int64_t place = layer * row.layer_stride + head * row.head_stride + begin * E, to = part * H + head * G;
      compute(queries + (b * H + head * G) * D, (const char*)row.keys + place, (const char*)row.values + place,
              weights.data(), sums.data() + to * D, largest.data() + to, totals.data() + to, G, end - begin, D, E);
    }
#pragma omp for schedule(static)
    for (int64_t task = 0; task < B * H; task++) {
      const int64_t b = task / H, first = first_part[b] * H + task % H;
      join_parts(sums.data() + first * D, largest.data() + first, totals.data() + first, first_part[b + 1] - first_part[b],
                 H, D, results + task * D);
    }
  }
  std::memset(results + B * H * D, 0, (M - B) * H * D * sizeof(float));
  return y;
}

// ---- attention of prompts --------------------------------------------------------------------------------------------

inline int64_t up_to_block(int64_t n) { return (n + BLOCK - 1) / BLOCK * BLOCK; }

// The keys and values of a head as weights of products: keys [S / 16, D, 16] and values [D / 16, S, 16], both padded.
struct Head {
  std::vector<float> keys, values;

  void pack(const float* k, const float* v, int64_t k_stride, int64_t v_stride, int64_t S, int64_t D) {
    const int64_t padded_S = up_to_block(S), padded_D = up_to_block(D);
    keys.assign(padded_S * D, 0);
    values.assign(padded_D * padded_S, 0);
    for (int64_t first = 0; first < S; first += BLOCK) {
      float* block = keys.data() + first * D;
      const int64_t n = std::min(BLOCK, S - first);
      for (int64_t d = 0; d < D; d++)
        for (int64_t s = 0; s < n; s++) block[d * BLOCK + s] = k[(first + s) * k_stride + d];
    }
    for (int64_t first = 0; first < D; first += BLOCK)
      for (int64_t s = 0; s < S; s++)
        std::memcpy(values.data() + (first / BLOCK * padded_S + s) * BLOCK, v + s * v_stride + first,
                    std::min(BLOCK, D - first) * sizeof(float));
  }
};

// y [N, 16 * blocks] = x [N, I] times weights of blocks.
void multiply_blocks(const float* x, int64_t x_stride, int64_t N, int64_t I, const float* weight, int64_t block_stride,
                     int64_t blocks, float* y, int64_t y_stride) {
  int64_t block = 0;
  for (; block + SIDE <= blocks; block += SIDE)
    multiply_rows<SIDE>(x, x_stride, N, I, weight + block * block_stride, block_stride, y + block * BLOCK, y_stride);
  for (; block < blocks; block++)
    multiply_rows<1>(x, x_stride, N, I, weight + block * block_stride, block_stride, y + block * BLOCK, y_stride);
}

// The weights of a query from its scores, of which `seen` says the visible ones: e^(score - largest), and 0 for the others.
// Returns their sum.
float to_weights(float* scores, const bool* seen, int64_t n) {
  float largest = UNSEEN, total = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t s = 0; s < n; s++) {
    scores[s] = seen[s] ? scores[s] : UNSEEN;
    largest = scores[s] > largest ? scores[s] : largest;
  }
#pragma omp simd reduction(+ : total)
  for (int64_t s = 0; s < n; s++) {
    const float weight = exponential(scores[s] - largest);
    scores[s] = scores[s] > UNSEEN ? weight : 0;
    total += scores[s];
  }
  return total;
}

// q [B, H, T, D], k and v [B, K, S, D] fp32 whose vectors have no gaps, mask [B or 1, 1, T, S] or [0] for the causal one,
// to the attention output [B, T, H * D].
Tensor attend_prompt(Tensor q, Tensor k, Tensor v, Tensor mask) {
  const int64_t B = q.size(0), H = q.size(1), T = q.size(2), D = q.size(3), K = k.size(1), S = k.size(2), G = H / K;
  const int64_t padded_S = up_to_block(S), padded_D = up_to_block(D), parts = (T + QUERIES - 1) / QUERIES;
  Tensor y = torch::stable::new_empty(q, {B, T, H * D});
  const auto *queries = (const float*)q.data_ptr(), *keys = (const float*)k.data_ptr(), *values = (const float*)v.data_ptr();
  const auto* masks = mask.numel() ? (const bool*)mask.data_ptr() : nullptr;
  const int64_t mask_stride = masks && mask.size(0) > 1 ? T * S : 0;
  auto* results = (float*)y.data_ptr();
  const float scale = 1 / std::sqrt((float)D);
  std::vector<Head> heads(B * K);
#pragma omp parallel
  {
    std::vector<float> scaled(QUERIES * D), scores(QUERIES * padded_S), sums(QUERIES * padded_D), totals(QUERIES);
    std::vector<char> visible(QUERIES * padded_S);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < B * K; i++) {
      const int64_t b = i / K, head = i % K;
      heads[i].pack(keys + b * k.stride(0) + head * k.stride(1), values + b * v.stride(0) + head * v.stride(1), k.stride(2),
                    v.stride(2), S, D);
    }
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < B * H * parts; task++) {
      const int64_t b = task / parts / H, head = task / parts % H, first = (parts - 1 - task % parts) * QUERIES;
      const int64_t n = std::min(QUERIES, T - first);
      auto* seen = (bool*)visible.data();
      int64_t begin = S, end = 0;  // of what any of these queries sees
      for (int64_t t = 0; t < n; t++) {
        bool* own = seen + t * padded_S;
        int64_t low = 0, high = masks ? S : S - T + first + t + 1;
        if (masks) std::memcpy(own, masks + b * mask_stride + (first + t) * S, S);
        else std::memset(own, 1, high);
        std::memset(own + high, 0, padded_S - high);
        while (low < high && !own[low]) low++;
        while (high > low && !own[high - 1]) high--;
        begin = std::min(begin, low), end = std::max(end, high);
      }
      begin = begin / BLOCK * BLOCK, end = up_to_block(end);
      for (int64_t t = 0; t < n; t++) {
        const float* query = queries + b * q.stride(0) + head * q.stride(1) + (first + t) * q.stride(2);
        for (int64_t d = 0; d < D; d++) scaled[t * D + d] = scale * query[d];
      }
      const Head& own = heads[b * K + head / G];
      const int64_t span = end - begin;
      multiply_blocks(scaled.data(), D, n, D, own.keys.data() + begin * D, BLOCK * D, span / BLOCK, scores.data(), span);
      for (int64_t t = 0; t < n; t++) totals[t] = to_weights(scores.data() + t * span, seen + t * padded_S + begin, span);
      multiply_blocks(scores.data(), span, n, span, own.values.data() + begin * BLOCK, padded_S * BLOCK, padded_D / BLOCK,
                      sums.data(), padded_D);
      for (int64_t t = 0; t < n; t++) {
        float* result = results + ((b * T + first + t) * H + head) * D;
        for (int64_t d = 0; d < D; d++) result[d] = sums[t * padded_D + d] / totals[t];
      }
    }
  }
  return y;
}

}  // namespace

#define REGISTER(ns)                                                                                       \
  STABLE_TORCH_LIBRARY_FRAGMENT(ns, library) {                                                             \
    library.def("attend_rows(Tensor q, Tensor k, Tensor v, Tensor table, Tensor windows, Tensor layer, bool int8) -> Tensor"); \
    library.def("attend_prompt(Tensor q, Tensor k, Tensor v, Tensor mask) -> Tensor");                     \
  }                                                                                                        \
  STABLE_TORCH_LIBRARY_IMPL(ns, CPU, library) {                                                            \
    library.impl("attend_rows", TORCH_BOX(&attend_rows));                                                  \
    library.impl("attend_prompt", TORCH_BOX(&attend_prompt));                                              \
  }
REGISTER(LIBRARY)
