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

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "vectors.h"

using torch::stable::Tensor;

namespace {

constexpr int64_t GROUP = 32;                    // inputs that share a scale
constexpr int32_t ZERO = 128;                    // the byte of a weight of 8 bits that is zero
constexpr float STRETCHES[] = {1.0f, 0.9f, 0.8f};  // of a group's range: where the search begins
constexpr int64_t REFINEMENTS = 2;               // least-squares fits of step and minimum
constexpr float SMALLEST_STEP = 0x1p-14f;

// ---- the product -----------------------------------------------------------------------------------------------------

#if defined(SUMS_OF_FOUR)
template <int BITS>
using Number = int8_t;
#else
template <int BITS>
using Number = std::conditional_t<BITS == 8, int16_t, int8_t>;
#endif

template <int BITS>
struct Inputs {  // rounded to 8 bits
  int64_t I, G;
  std::vector<Number<BITS>> numbers;  // [N, I]; of each four in 16 bits the two with even places come first
  std::vector<float> scales;          // [N, G]
  std::vector<int32_t> totals;        // [N, G], the sum of a group's numbers; with 8 bits times -ZERO, as weights have it added
};

template <int BITS>
Inputs<BITS> round_inputs(const float* x, int64_t N, int64_t I) {
  const int64_t G = I / GROUP;
  Inputs<BITS> found{I, G, std::vector<Number<BITS>>(N * I), std::vector<float>(N * G), std::vector<int32_t>(N * G)};
#pragma omp parallel for if (N > 1)
  for (int64_t group = 0; group < N * G; group++) {
    const float* from = x + group * GROUP;
    Number<BITS>* to = found.numbers.data() + group * GROUP;
    float largest = 0;
    for (int64_t i = 0; i < GROUP; i++) {
      const float size = std::fabs(from[i]);
      largest = size > largest ? size : largest;
    }
    const float inverse = largest > 0 ? 127 / largest : 0;
    int32_t total = 0;
    for (int64_t i = 0; i < GROUP; i++) {
      const auto number = (Number<BITS>)std::nearbyint(from[i] * inverse);
      to[sizeof number == 1 ? i : i / 4 * 4 + i % 2 * 2 + i / 2 % 2] = number;
      total += number;
    }
    found.scales[group] = largest / 127;
    found.totals[group] = BITS == 8 ? -ZERO * total : total;
  }
  return found;
}

// Add the products of a group's weights, for the outputs of a block, and the inputs of M rows, which are `stride` apart.
#if defined(SUMS_OF_FOUR)
template <int BITS, int M>
inline void add_group(Sums (&sums)[M][VECTORS], const uint8_t* weight, const int8_t* inputs, int64_t stride) {
#pragma GCC unroll 1
  for (int64_t i = 0; i < GROUP; i += 32 / BITS, weight += 4 * BLOCK) {
    for (int v = 0; v < VECTORS; v++) {
      const Bytes both = load(weight + v * 4 * LANES);  // with 4 bits, 4 inputs in low halves and 4 in high ones
      for (int m = 0; m < M; m++) {
        const int8_t* own = inputs + m * stride + i;
        sums[m][v] = add_fours(sums[m][v], BITS == 8 ? both : low_half(both), spread(own));
        if constexpr (BITS == 4) sums[m][v] = add_fours(sums[m][v], high_half(both), spread(own + 4));
        hold(sums[m][v]);
      }
    }
  }
}
#else
template <bool HIGH, int M>
inline void add_halves(Twos (&twos)[M][VECTORS], const uint8_t* weight, const int8_t* inputs, int64_t stride) {
#pragma GCC unroll 1
  for (int64_t i = HIGH ? 4 : 0; i < GROUP; i += 8, weight += 4 * BLOCK) {
    Bytes halves[VECTORS];
    for (int v = 0; v < VECTORS; v++) {
      const Bytes both = load(weight + v * 4 * LANES);
      halves[v] = HIGH ? high_half(both) : low_half(both);
    }
    for (int m = 0; m < M; m++) {
      for (int v = 0; v < VECTORS; v++) {
        twos[m][v] = add_twos(twos[m][v], halves[v], spread(inputs + m * stride + i));
        hold(twos[m][v]);
      }
    }
  }
}

template <int BITS, int M>
inline void add_group(Sums (&sums)[M][VECTORS], const uint8_t* weight, const Number<BITS>* inputs, int64_t stride) {
  if constexpr (BITS == 4) {
    Twos twos[M][VECTORS];  // a group's fit in 16 bits: they are at most 16 * 15 * 127
    for (auto& each : twos)
      for (auto& two : each) two = no_twos();
    add_halves<false>(twos, weight, inputs, stride);
    add_halves<true>(twos, weight, inputs, stride);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < VECTORS; v++) sums[m][v] = add_products(sums[m][v], twos[m][v], ones());
  } else {
#pragma GCC unroll 1
    for (int64_t i = 0; i < GROUP; i += 4, weight += 4 * BLOCK) {
      Twos even[VECTORS], odd[VECTORS];
      for (int v = 0; v < VECTORS; v++) {
        const Bytes both = load(weight + v * 4 * LANES);
        even[v] = even_bytes(both), odd[v] = odd_bytes(both);
      }
      for (int m = 0; m < M; m++) {
        const int16_t* own = inputs + m * stride + i;
        for (int v = 0; v < VECTORS; v++) sums[m][v] = add_products(sums[m][v], even[v], spread(own));
        for (int v = 0; v < VECTORS; v++) sums[m][v] = add_products(sums[m][v], odd[v], spread(own + 2)), hold(sums[m][v]);
      }
    }
  }
}
#endif

template <int BITS, int M>  // rows from `row` on, and the outputs of a block
void multiply(const Inputs<BITS>& x, int64_t row, const uint8_t* weight, const uint16_t* scale, float* y, int64_t stride) {
  Floats results[M][VECTORS];
  for (auto& each : results)
    for (auto& result : each) result = all(0);
  for (int64_t g = 0; g < x.G; g++) {
    Sums sums[M][VECTORS];
    for (int m = 0; m < M; m++)
      for (auto& sum : sums[m]) sum = all_sums(BITS == 8 ? x.totals[(row + m) * x.G + g] : 0);
    add_group<BITS, M>(sums, weight, x.numbers.data() + row * x.I + g * GROUP, x.I);
    for (int v = 0; v < VECTORS; v++) {
      const Floats step = load_halves(scale + v * LANES);
      for (int m = 0; m < M; m++) {
        const int64_t group = (row + m) * x.G + g;
        Floats product = times(to_floats(sums[m][v]), step);
        if constexpr (BITS == 4) product = add_scaled(product, load_halves(scale + BLOCK + v * LANES), x.totals[group]);
        results[m][v] = add_scaled(results[m][v], product, x.scales[group]);
      }
    }
    weight += GROUP * BLOCK * BITS / 8;
    scale += (BITS == 8 ? 1 : 2) * BLOCK;
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < VECTORS; v++) store(y + m * stride + v * LANES, results[m][v]);
}

using Tensors = std::vector<Tensor>;

template <int BITS>
Tensor product(const Tensor& x, const Tensors& weights, const Tensors& scales) {
  const int64_t N = x.size(0), I = x.size(1);
  std::vector<int64_t> first{0};  // of each matrix, its first block of outputs
  for (const Tensor& weight : weights) first.push_back(first.back() + weight.size(0));
  const int64_t blocks = first.back(), O = blocks * BLOCK;
  Tensor y = torch::stable::new_empty(x, {N, O});
  const Inputs<BITS> inputs = round_inputs<BITS>((const float*)x.data_ptr(), N, I);
  auto* results = (float*)y.data_ptr();
#pragma omp parallel for
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t matrix = std::upper_bound(first.begin(), first.end(), block) - first.begin() - 1, at = block - first[matrix];
    const uint8_t* weight = (const uint8_t*)weights[matrix].data_ptr() + at * BLOCK * I * BITS / 8;
    const uint16_t* scale = (const uint16_t*)scales[matrix].data_ptr() + at * inputs.G * (BITS == 8 ? 1 : 2) * BLOCK;
    float* to = results + block * BLOCK;
    int64_t row = 0;
    for (; row + ROWS <= N; row += ROWS) multiply<BITS, ROWS>(inputs, row, weight, scale, to + row * O, O);
    for (; row + 4 <= N; row += 4) multiply<BITS, 4>(inputs, row, weight, scale, to + row * O, O);
    for (; row < N; row++) multiply<BITS, 1>(inputs, row, weight, scale, to + row * O, O);
  }
  return y;
}

// x [N, I] fp32, each weight [O / 16, I * 8] and scale [O / 16, G, 2, 16] as grouped.py packs them, to their outputs side by
// side, [N, sum of O] fp32.
Tensor int4_product(Tensor x, Tensors weights, Tensors scales) { return product<4>(x, weights, scales); }

// The same with weights [O / 16, I * 16] and scales [O / 16, G, 16].
Tensor int8_product(Tensor x, Tensors weights, Tensors scales) { return product<8>(x, weights, scales); }

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
    if (block + SIDE <= blocks) multiply_rows<SIDE>(rows, I, N, I, own, I * BLOCK, to, O);
    else multiply_rows<1>(rows, I, N, I, own, I * BLOCK, to, O);
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
    library.def("int4_product(Tensor x, Tensor[] weights, Tensor[] scales) -> Tensor");        \
    library.def("int8_product(Tensor x, Tensor[] weights, Tensor[] scales) -> Tensor");        \
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
