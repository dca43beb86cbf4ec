// Vectors of AVX-512 or AVX2, else plain loops, and the product of a few rows in fp32 that both kernels use.
//
// Shapes: N rows, I inputs, outputs in blocks of 16.

#pragma once

#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

using torch::headeronly::Half;

constexpr int64_t BLOCK = 16;  // outputs that are computed together

// ---- vectors: weights of `LANES` outputs and 4 inputs as bytes, sums as integers, results as floats ------------------
//
// Processors that sum four products of bytes at once define SUMS_OF_FOUR. The others sum two, in 16 bits where bytes of 4
// bits (`add_twos`), in 32 where bytes of 8 have been widened (`add_products`). `hold` keeps a sum in its register: gcc makes
// copies of the sums of a loop, for which there are no registers left.

inline int32_t four_bytes(const void* p) {
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return bytes;
}

#if defined(__AVX512F__) && defined(__AVX512BW__)
constexpr int LANES = 16;
using Bytes = __m512i;
using Twos = __m512i;
using Sums = __m512i;
using Floats = __m512;

inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline Bytes low_half(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high_half(Bytes b) { return low_half(_mm512_srli_epi16(b, 4)); }
inline Sums all_sums(int32_t number) { return _mm512_set1_epi32(number); }
inline void hold(Sums& sums) { asm("" : "+v"(sums)); }
inline Bytes spread(const void* p) { return _mm512_set1_epi32(four_bytes(p)); }
#if defined(__AVX512VNNI__)
#define SUMS_OF_FOUR
inline Sums add_fours(Sums sums, Bytes weights, Bytes x) { return _mm512_dpbusd_epi32(sums, weights, x); }
#else
inline Twos no_twos() { return _mm512_setzero_si512(); }
inline Twos add_twos(Twos twos, Bytes halves, Bytes x) { return _mm512_add_epi16(twos, _mm512_maddubs_epi16(halves, x)); }
inline Twos even_bytes(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi16(255)); }
inline Twos odd_bytes(Bytes b) { return _mm512_srli_epi16(b, 8); }
inline Twos ones() { return _mm512_set1_epi16(1); }
inline Sums add_products(Sums sums, Twos a, Twos b) { return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b)); }
#endif
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
using Twos = __m256i;
using Sums = __m256i;
using Floats = __m256;

inline Bytes load(const uint8_t* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Bytes low_half(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi8(15)); }
inline Bytes high_half(Bytes b) { return low_half(_mm256_srli_epi16(b, 4)); }
inline Sums all_sums(int32_t number) { return _mm256_set1_epi32(number); }
inline void hold(Sums& sums) { asm("" : "+x"(sums)); }
inline Bytes spread(const void* p) { return _mm256_set1_epi32(four_bytes(p)); }
#if defined(__AVXVNNI__)
#define SUMS_OF_FOUR
inline Sums add_fours(Sums sums, Bytes weights, Bytes x) { return _mm256_dpbusd_avx_epi32(sums, weights, x); }
#else
inline Twos no_twos() { return _mm256_setzero_si256(); }
inline Twos add_twos(Twos twos, Bytes halves, Bytes x) { return _mm256_add_epi16(twos, _mm256_maddubs_epi16(halves, x)); }
inline Twos even_bytes(Bytes b) { return _mm256_and_si256(b, _mm256_set1_epi16(255)); }
inline Twos odd_bytes(Bytes b) { return _mm256_srli_epi16(b, 8); }
inline Twos ones() { return _mm256_set1_epi16(1); }
inline Sums add_products(Sums sums, Twos a, Twos b) { return _mm256_add_epi32(sums, _mm256_madd_epi16(a, b)); }
#endif
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
inline Sums all_sums(int32_t number) { Sums s; for (auto& v : s.v) v = number; return s; }
inline void hold(Sums&) {}
inline Bytes spread(const void* p) { Bytes b; for (int i = 0; i < LANES; i++) std::memcpy(b.v + 4 * i, p, 4); return b; }
#define SUMS_OF_FOUR
inline Sums add_fours(Sums sums, const Bytes& weights, const Bytes& x) {
  for (int i = 0; i < 4 * LANES; i++) sums.v[i / 4] += weights.v[i] * (int8_t)x.v[i];
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

constexpr int VECTORS = BLOCK / LANES;           // of a block's outputs
constexpr int64_t ROWS = LANES == 16 ? 8 : 6;    // rows that share a read of the weights: as many as registers hold
constexpr int64_t SIDE = LANES == 16 ? 2 : 1;    // blocks of fp32 side by side, likewise
constexpr int64_t AHEAD = 24;                    // inputs whose weights in fp32 are fetched before their use

// ---- the product in fp32 ---------------------------------------------------------------------------------------------

// y [M, 16 * BLOCKS] = x [M, I] times weights of BLOCKS blocks, each [I, 16]. The strides count numbers from a row, or a
// block, to the next.
template <int M, int BLOCKS>
void multiply_fp32(const float* x, int64_t x_stride, int64_t I, const float* weight, int64_t block_stride, float* y,
                   int64_t y_stride) {
  Floats sums[M][BLOCKS * VECTORS];
  for (auto& each : sums)
    for (auto& sum : each) sum = all(0);
  for (int64_t i = 0; i < I; i++) {
    Floats weights[BLOCKS * VECTORS];
    for (int v = 0; v < BLOCKS * VECTORS; v++)
      weights[v] = load_floats(weight + v / VECTORS * block_stride + i * BLOCK + v % VECTORS * LANES);
    for (int b = 0; b < BLOCKS; b++) __builtin_prefetch(weight + b * block_stride + (i + AHEAD) * BLOCK);
    for (int m = 0; m < M; m++)
      for (int v = 0; v < BLOCKS * VECTORS; v++) sums[m][v] = add_scaled(sums[m][v], weights[v], x[m * x_stride + i]);
  }
  for (int m = 0; m < M; m++)
    for (int v = 0; v < BLOCKS * VECTORS; v++) store(y + m * y_stride + v * LANES, sums[m][v]);
}

// The same for N rows. A row's result does not depend on the other rows.
template <int BLOCKS>
void multiply_rows(const float* x, int64_t x_stride, int64_t N, int64_t I, const float* weight, int64_t block_stride,
                   float* y, int64_t y_stride) {
  int64_t row = 0;
  const auto from = [&] { return x + row * x_stride; };
  const auto to = [&] { return y + row * y_stride; };
  for (; row + ROWS <= N; row += ROWS) multiply_fp32<ROWS, BLOCKS>(from(), x_stride, I, weight, block_stride, to(), y_stride);
  for (; row + 4 <= N; row += 4) multiply_fp32<4, BLOCKS>(from(), x_stride, I, weight, block_stride, to(), y_stride);
  for (; row < N; row++) multiply_fp32<1, BLOCKS>(from(), x_stride, I, weight, block_stride, to(), y_stride);
}

}  // namespace
