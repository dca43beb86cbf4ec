// Products of few rows with weights of 4, 8 or 32 bits, on a CPU; llm/inference/grouped.py and packed.py have the layouts
// and the plain formulas.
//
// With weights of 4 and 8 bits, inputs are rounded to 8 bits, each group of a row with a scale of its own, so that a
// group's products are sums of integers. A row's result does not depend on the other rows. Compiled for AVX-512 or AVX2,
// else as plain loops.
//
// Shapes: N rows, I inputs, G groups of 32 inputs, O outputs in blocks of 16.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

using torch::headeronly::Half;
using torch::stable::Tensor;

namespace {

constexpr int64_t GROUP = 32;           // inputs that share a scale
constexpr int64_t BLOCK = 16;           // outputs that are computed together
constexpr float ZERO = 128;             // the byte of a weight of 8 bits that is zero
constexpr int64_t STEP = 8;             // inputs that are multiplied at once: twice 4
constexpr float STRETCHES[] = {1.0f, 0.9f, 0.8f};  // of a group's range: where the search begins
constexpr int64_t REFINEMENTS = 2;               // least-squares fits of step and minimum
constexpr float SMALLEST_STEP = 0x1p-14f;

// ---- vectors: weights of `LANES` outputs and 4 inputs as bytes, sums as integers, results as floats ------------------

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
using Bytes = __m512i;
using Sums = __m512i;
using Floats = __m512;

inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_half(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_half(Bytes b) { return low_half(_mm512_srli_epi16(b, 4)); }
inline Sums no_sums() { return _mm512_setzero_si512(); }
inline Bytes spread(int32_t inputs) { return _mm512_set1_epi32(inputs); }
inline Sums add_pairs(Sums sums, Bytes halves, Bytes x, int16_t factor) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(_mm512_maddubs_epi16(halves, x), _mm512_set1_epi16(factor)));
}
inline Floats all(float number) { return _mm512_set1_ps(number); }
inline Floats to_floats(Sums sums) { return _mm512_cvtepi32_ps(sums); }
inline Floats load_halves(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats add_scaled(Floats sum, Floats a, float b) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), sum); }
inline Floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }

#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr int LANES = 8;
using Bytes = __m256i;
using Sums = __m256i;
using Floats = __m256;

inline Bytes load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes low_half(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes high_half(Bytes b) { return low_half(_mm256_srli_epi16(b, 4)); }
inline Sums no_sums() { return _mm256_setzero_si256(); }
inline Bytes spread(int32_t inputs) { return _mm256_set1_epi32(inputs); }
inline Sums add_pairs(Sums sums, Bytes halves, Bytes x, int16_t factor) {
  return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(halves, x), _mm256_set1_epi16(factor)));
}
inline Floats all(float number) { return _mm256_set1_ps(number); }
inline Floats to_floats(Sums sums) { return _mm256_cvtepi32_ps(sums); }
inline Floats load_halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
inline Floats times(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats add_scaled(Floats sum, Floats a, float b) { return _mm256_fmadd_ps(a, _mm256_set1_ps(b), sum); }
inline Floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }

#else
constexpr int LANES = 16;
struct Bytes { uint8_t v[4 * LANES]; };
struct Sums { int32_t v[LANES]; };
struct Floats { float v[LANES]; };

inline Bytes load(const uint8_t* p) { Bytes b; std::memcpy(b.v, p, sizeof b.v); return b; }
inline Bytes low_half(Bytes b) { for (auto& v : b.v) v &= 15; return b; }
inline Bytes high_half(Bytes b) { for (auto& v : b.v) v >>= 4; return b; }
inline Sums no_sums() { return {}; }
inline Bytes spread(int32_t inputs) { Bytes b; for (int i = 0; i < LANES; i++) std::memcpy(b.v + 4 * i, &inputs, 4); return b; }
inline Sums add_pairs(Sums sums, const Bytes& halves, const Bytes& x, int16_t factor) {
  for (int lane = 0; lane < LANES; lane++)
    for (int i = 4 * lane; i < 4 * lane + 4; i++) sums.v[lane] += halves.v[i] * (int8_t)x.v[i] * factor;
  return sums;
}
inline Floats all(float number) { Floats f; for (auto& v : f.v) v = number; return f; }
inline Floats to_floats(Sums sums) { Floats f; for (int i = 0; i < LANES; i++) f.v[i] = sums.v[i]; return f; }
inline Floats load_halves(const uint16_t* p) { Floats f; for (int i = 0; i < LANES; i++) f.v[i] = Half(p[i], Half::from_bits()); return f; }
inline Floats times(Floats a, const Floats& b) { for (int i = 0; i < LANES; i++) a.v[i] *= b.v[i]; return a; }
inline Floats add_scaled(Floats sum, const Floats& a, float b) { for (int i = 0; i < LANES; i++) sum.v[i] += a.v[i] * b; return sum; }
inline Floats load_floats(const float* p) { Floats a; std::memcpy(a.v, p, sizeof a.v); return a; }
inline void store(float* p, const Floats& a) { std::memcpy(p, a.v, sizeof a.v); }
#endif

// Add the products of weights, BITS wide, and 4 inputs. Pairs of products are summed in 16 bits, where those of halves of a
// byte, at most 2 * 15 * 127, do not overflow.
template <int BITS>
inline Sums add_products(Sums sums, Bytes weights, int32_t inputs) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  return _mm512_dpbusd_epi32(sums, weights, spread(inputs));
#else
  if constexpr (BITS == 4) return add_pairs(sums, weights, spread(inputs), 1);
  return add_pairs(add_pairs(sums, low_half(weights), spread(inputs), 1), high_half(weights), spread(inputs), 16);
#endif
}

constexpr int VECTORS = BLOCK / LANES;           // of a block's outputs
constexpr int64_t ROWS = LANES == 16 ? 8 : 4;    // rows that share a read of the weights: as many as registers hold
constexpr int64_t SIDE = LANES == 16 ? 2 : 1;    // blocks of fp32 side by side, likewise
constexpr int64_t AHEAD = 24;                    // inputs whose weights in fp32 are fetched before their use

// ---- the product -----------------------------------------------------------------------------------------------------

struct Inputs {  // rounded to 8 bits
  int64_t I, G;
  std::vector<int8_t> numbers;  // [N, I]
  std::vector<float> scales;    // [N, G]
  std::vector<float> totals;    // [N, G], the sum of a group's rounded inputs
};

Inputs round_inputs(const float* x, int64_t N, int64_t I) {
  const int64_t G = I / GROUP;
  Inputs found{I, G, std::vector<int8_t>(N * I), std::vector<float>(N * G), std::vector<float>(N * G)};
#pragma omp parallel for if (N > 1)
  for (int64_t group = 0; group < N * G; group++) {
    const float* from = x + group * GROUP;
    int8_t* to = found.numbers.data() + group * GROUP;
    float largest = 0;
    for (int64_t i = 0; i < GROUP; i++) {
      const float size = std::fabs(from[i]);
      largest = size > largest ? size : largest;
    }
    const float inverse = largest > 0 ? 127 / largest : 0;
    int32_t total = 0;
    for (int64_t i = 0; i < GROUP; i++) {
      const int32_t number = (int32_t)std::nearbyint(from[i] * inverse);
      to[i] = (int8_t)number;
      total += number;
    }
    found.scales[group] = largest / 127;
    found.totals[group] = found.scales[group] * total;
  }
  return found;
}

template <int BITS, int M>  // rows from `row` on, and the outputs of a block
void multiply(const Inputs& x, int64_t row, const uint8_t* weight, const uint16_t* scale, float* y, int64_t stride) {
  Floats results[M][VECTORS];
  for (auto& each : results)
    for (auto& result : each) result = all(0);
  for (int64_t g = 0; g < x.G; g++) {
    Sums sums[M][VECTORS];
    for (auto& each : sums)
      for (auto& sum : each) sum = no_sums();
    for (int64_t i = g * GROUP; i < (g + 1) * GROUP; i += STEP, weight += BLOCK * STEP * BITS / 8) {
      for (int v = 0; v < VECTORS; v++) {
        const Bytes both = load(weight + v * 4 * LANES);  // with 4 bits, 4 inputs in low halves and 4 in high ones
        const Bytes first = BITS == 8 ? both : low_half(both);
        const Bytes second = BITS == 8 ? load(weight + (VECTORS + v) * 4 * LANES) : high_half(both);
        for (int m = 0; m < M; m++) {
          int32_t inputs[2];
          std::memcpy(inputs, x.numbers.data() + (row + m) * x.I + i, sizeof inputs);
          sums[m][v] = add_products<BITS>(add_products<BITS>(sums[m][v], first, inputs[0]), second, inputs[1]);
        }
      }
    }
    for (int v = 0; v < VECTORS; v++) {
      const Floats step = load_halves(scale + v * LANES);
      const Floats minimum = BITS == 8 ? times(step, all(-ZERO)) : load_halves(scale + BLOCK + v * LANES);
      for (int m = 0; m < M; m++) {
        const int64_t group = (row + m) * x.G + g;
        results[m][v] = add_scaled(results[m][v], times(to_floats(sums[m][v]), step), x.scales[group]);
        results[m][v] = add_scaled(results[m][v], minimum, x.totals[group]);
      }
    }
    scale += (BITS == 8 ? 1 : 2) * BLOCK;
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECTORS; v++) store(y + m * stride + v * LANES, results[m][v]);
}

template <int BITS>
Tensor product(const Tensor& x, const Tensor& weight, const Tensor& scale) {
  const int64_t N = x.size(0), I = x.size(1), blocks = weight.size(0), O = blocks * BLOCK;
  Tensor y = torch::stable::new_empty(x, {N, O});
  const Inputs inputs = round_inputs((const float*)x.data_ptr(), N, I);
  const auto* weights = (const uint8_t*)weight.data_ptr();
  const auto* scales = (const uint16_t*)scale.data_ptr();
  auto* results = (float*)y.data_ptr();
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; block++) {
    const uint8_t* own = weights + block * BLOCK * I * BITS / 8;
    const uint16_t* own_scale = scales + block * inputs.G * (BITS == 8 ? 1 : 2) * BLOCK;
    float* to = results + block * BLOCK;
    int64_t row = 0;
    for (; row + ROWS <= N; row += ROWS) multiply<BITS, ROWS>(inputs, row, own, own_scale, to + row * O, O);
    for (; row + 4 <= N; row += 4) multiply<BITS, 4>(inputs, row, own, own_scale, to + row * O, O);
    for (; row < N; row++) multiply<BITS, 1>(inputs, row, own, own_scale, to + row * O, O);
  }
  return y;
}

// x [N, I] fp32, weight [O / 16, I * 8] and scale [O / 16, G, 2, 16] as grouped.py packs them, to [N, O] fp32.
Tensor int4_product(Tensor x, Tensor weight, Tensor scale) { return product<4>(x, weight, scale); }

// The same with weight [O / 16, I * 16] and scale [O / 16, G, 16].
Tensor int8_product(Tensor x, Tensor weight, Tensor scale) { return product<8>(x, weight, scale); }

template <int M, int BLOCKS>  // M rows, and the outputs of BLOCKS blocks
void multiply_fp32(const float* x, int64_t I, const float* weight, float* y, int64_t stride) {
  Floats sums[M][BLOCKS * VECTORS];
  for (auto& each : sums)
    for (auto& sum : each) sum = all(0);
  for (int64_t i = 0; i < I; i++) {
    Floats weights[BLOCKS * VECTORS];
    for (int v = 0; v < BLOCKS * VECTORS; v++)
      weights[v] = load_floats(weight + v / VECTORS * I * BLOCK + i * BLOCK + v % VECTORS * LANES);
    for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(weight + (b * I + i + AHEAD) * BLOCK);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < BLOCKS * VECTORS; v++) sums[m][v] = add_scaled(sums[m][v], weights[v], x[m * I + i]);
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < BLOCKS * VECTORS; v++) store(y + m * stride + v * LANES, sums[m][v]);
}

template <int BLOCKS>
void multiply_rows(const float* x, int64_t N, int64_t I, const float* weight, float* y, int64_t stride) {
  int64_t row = 0;
  for (; row + ROWS <= N; row += ROWS) multiply_fp32<ROWS, BLOCKS>(x + row * I, I, weight, y + row * stride, stride);
  for (; row + 4 <= N; row += 4) multiply_fp32<4, BLOCKS>(x + row * I, I, weight, y + row * stride, stride);
  for (; row < N; row++) multiply_fp32<1, BLOCKS>(x + row * I, I, weight, y + row * stride, stride);
}

// x [N, I] and weight [O / 16, I, 16] fp32, to [N, O] fp32.
Tensor float_product(Tensor x, Tensor weight) {
  const int64_t N = x.size(0), I = x.size(1), blocks = weight.size(0), O = blocks * BLOCK;
  Tensor y = torch::stable::new_empty(x, {N, O});
  const auto *rows = (const float*)x.data_ptr(), *weights = (const float*)weight.data_ptr();
  auto* results = (float*)y.data_ptr();
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; block += SIDE) {
    const float* own = weights + block * I * BLOCK;
    float* to = results + block * BLOCK;
    if (block + SIDE <= blocks) multiply_rows<SIDE>(rows, N, I, own, to, O);
    else multiply_rows<1>(rows, N, I, own, to, O);
  }
  return y;
}

// ---- rounding --------------------------------------------------------------------------------------------------------

float rounded_to_half(float x) { return (float)Half(x); }

// Round a group to the nearest of 16 numbers; return the weighted squared error.
float round_to(const float* group, const float* importance, float step, float minimum, float* q) {
  const float inverse = 1 / step;
  float error = 0;
#pragma omp simd reduction(+ : error)
  for (int64_t i = 0; i < GROUP; i++) {
    const float number = std::nearbyint((group[i] - minimum) * inverse);
    q[i] = number < 0 ? 0 : number > 15 ? 15 : number;
    const float difference = q[i] * step + minimum - group[i];
    error += importance[i] * difference * difference;
  }
  return error;
}

// Fit step and minimum to a rounded group by weighted least squares.
void fit(const float* group, const float* importance, const float* q, float& step, float& minimum) {
  float total = 0, mean_q = 0, mean = 0, variance = 0, covariance = 0;
#pragma omp simd reduction(+ : total, mean_q, mean)
  for (int64_t i = 0; i < GROUP; i++) {
    total += importance[i];
    mean_q += importance[i] * q[i];
    mean += importance[i] * group[i];
  }
  mean_q /= total, mean /= total;
#pragma omp simd reduction(+ : variance, covariance)
  for (int64_t i = 0; i < GROUP; i++) {
    variance += importance[i] * (q[i] - mean_q) * (q[i] - mean_q);
    covariance += importance[i] * (q[i] - mean_q) * (group[i] - mean);
  }
  if (variance > 0) {
    const float fitted = rounded_to_half(covariance / variance);
    if (fitted >= SMALLEST_STEP) step = fitted;
  }
  minimum = rounded_to_half(mean - step * mean_q);
}

// weight [O, I] and importance [I] fp32 to q [O, I] uint8 and pair [O, G, 2] fp16, as grouped.py's `round_to_4_bits` says.
void int4_round(Tensor weight, Tensor importance, Tensor q, Tensor pair) {
  const int64_t G = weight.size(1) / GROUP, groups = weight.size(0) * G;
  const auto* weights = (const float*)weight.data_ptr();
  const auto* importances = (const float*)importance.data_ptr();
  auto* numbers = (uint8_t*)q.data_ptr();
  auto* pairs = (Half*)pair.data_ptr();
#pragma omp parallel for
  for (int64_t g = 0; g < groups; g++) {
    const float *group = weights + g * GROUP, *own = importances + g % G * GROUP;
    float low = group[0], high = group[0], least = INFINITY, best[2] = {0, 0}, tried[GROUP];
    for (int64_t i = 1; i < GROUP; i++) {
      low = group[i] < low ? group[i] : low;
      high = group[i] > high ? group[i] : high;
    }
    for (const float stretch : STRETCHES) {
      float step = rounded_to_half(stretch * (high - low) / 15);
      step = step < SMALLEST_STEP ? SMALLEST_STEP : step;
      float minimum = rounded_to_half((low + high) / 2 - 7.5f * step);
      for (int64_t round = 0;; round++) {
        const float error = round_to(group, own, step, minimum, tried);
        if (error < least) {
          least = error, best[0] = step, best[1] = minimum;
          for (int64_t i = 0; i < GROUP; i++) numbers[g * GROUP + i] = (uint8_t)tried[i];
        }
        if (round == REFINEMENTS) break;
        fit(group, own, tried, step, minimum);
      }
    }
    pairs[2 * g] = Half(best[0]);
    pairs[2 * g + 1] = Half(best[1]);
  }
}

}  // namespace

#define REGISTER(ns)                                                                            \
  STABLE_TORCH_LIBRARY(ns, library) {                                                           \
    library.def("int4_product(Tensor x, Tensor weight, Tensor scale) -> Tensor");              \
    library.def("int8_product(Tensor x, Tensor weight, Tensor scale) -> Tensor");              \
    library.def("float_product(Tensor x, Tensor weight) -> Tensor");                           \
    library.def("int4_round(Tensor weight, Tensor importance, Tensor(a!) q, Tensor(b!) pair) -> ()"); \
  }                                                                                             \
  STABLE_TORCH_LIBRARY_IMPL(ns, CPU, library) {                                                 \
    library.impl("int4_product", TORCH_BOX(&int4_product));                                     \
    library.impl("int8_product", TORCH_BOX(&int8_product));                                     \
    library.impl("float_product", TORCH_BOX(&float_product));                                   \
    library.impl("int4_round", TORCH_BOX(&int4_round));                                         \
  }
REGISTER(LIBRARY)
