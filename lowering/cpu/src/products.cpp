// The inner loops, of which there is one for each number of rows. They are compiled apart from who
// calls them, beside it.

#include "products.h"

namespace skv {
namespace {

const U32 DIGITS = splat((uint32_t)0x00030003);

template <int ROWS>
void logits_tile(const uint32_t* words, int64_t dwords, int64_t tokens, const int32_t* queries,
               int32_t* out, Ahead& ahead) {
  for (int64_t n = 0; n < tokens; n += 2 * LANES) {
    I32 acc[ROWS][2] = {};
    for (int64_t d = 0; d < dwords; d++) {
      ahead.step();
      ahead.step();
      const U32 x0 = load<U32>(words + d * BATCH + n);
      const U32 x1 = load<U32>(words + d * BATCH + n + LANES);
#pragma GCC unroll 8
      for (int s = 0; s < 8; s++) {
        const U32 d0 = (x0 >> 2 * s) & DIGITS, d1 = (x1 >> 2 * s) & DIGITS;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          const I32 pair = splat(queries[(d * 8 + s) * TILE + r]);
          acc[r][0] = madd(acc[r][0], d0, pair);
          acc[r][1] = madd(acc[r][1], d1, pair);
        }
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) store(out + r * BATCH + n + j * LANES, acc[r][j]);
  }
}

template <int ROWS>
void sums_tile(const uint32_t* pairs, int64_t count, int64_t words, const int32_t* weights,
             const float* unit, float* sums, int64_t stride) {
  for (int64_t c = 0; c < words; c += LANES) {
#pragma GCC unroll 4
    for (int s = 0; s < 8; s += 2) {
      I32 acc[ROWS][2] = {};
      for (int64_t p = 0; p < count; p++) {
        U32 x = load<U32>(pairs + p * words + c);
        U32 d0 = (x >> 2 * s) & DIGITS, d1 = (x >> (2 * s + 2)) & DIGITS;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++) {
          I32 pair = splat(weights[r * (BATCH / 2) + p]);
          acc[r][0] = madd(acc[r][0], d0, pair);
          acc[r][1] = madd(acc[r][1], d1, pair);
        }
      }
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
          float* to = sums + r * stride + (s + j) * words + c;
          store(to, load<F32>(to) + to_float(acc[r][j]) * splat(unit[r]));
        }
    }
  }
}

template <int ROWS>
void product_tile(const float* x, int64_t x_row, int64_t n, const float* matrix, int64_t matrix_row,
             int64_t m, float* out, int64_t out_row) {
  for (int64_t c = 0; c < m; c += 2 * LANES) {
    const int64_t second = c + LANES < m ? LANES : 0;  // or the first again, for nothing
    F32 acc[ROWS][2];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) acc[r][j] = load<F32>(out + r * out_row + c + j * second);
    for (int64_t e = 0; e < n; e++) {
      const float* row = matrix + e * matrix_row + c;
      const F32 m0 = load<F32>(row), m1 = load<F32>(row + second);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) {
        const F32 one = splat(x[r * x_row + e]);
        acc[r][0] += one * m0;
        acc[r][1] += one * m1;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) store(out + r * out_row + c + j * second, acc[r][j]);
  }
}

template <int ROWS>
void dots_tile(const float* x, int64_t n, const float* keys, int64_t key_row, int64_t count,
               float* out) {
  for (int64_t i = 0; i < count; i++) {
    F32 acc[TILE] = {};
    for (int64_t d = 0; d < n; d += LANES) {
      const F32 k = load<F32>(keys + i * key_row + d);
#pragma GCC unroll 4
      for (int r = 0; r < ROWS; r++) acc[r] += k * load<F32>(x + r * n + d);
    }
    const Row32 found = sums(acc[0], acc[1], acc[2], acc[3]);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++) out[r * BATCH + i] += found[r];
  }
}

}  // namespace

#define SKV_FOR_ROWS(function, ...)                 \
  switch (rows) {                                   \
    case 1: return function##_tile<1>(__VA_ARGS__); \
    case 2: return function##_tile<2>(__VA_ARGS__); \
    case 3: return function##_tile<3>(__VA_ARGS__); \
    default: return function##_tile<4>(__VA_ARGS__); \
  }

void logits_of(int64_t rows, const uint32_t* words, int64_t dwords, int64_t tokens,
               const int32_t* queries, int32_t* out, Ahead& ahead) {
  SKV_FOR_ROWS(logits, words, dwords, tokens, queries, out, ahead)
}

void sums_of(int64_t rows, const uint32_t* pairs, int64_t count, int64_t words,
             const int32_t* weights, const float* unit, float* sums, int64_t stride) {
  SKV_FOR_ROWS(sums, pairs, count, words, weights, unit, sums, stride)
}

void product(int64_t rows, const float* x, int64_t x_row, int64_t n, const float* matrix,
             int64_t matrix_row, int64_t m, float* out, int64_t out_row) {
  SKV_FOR_ROWS(product, x, x_row, n, matrix, matrix_row, m, out, out_row)
}

void dots(int64_t rows, const float* x, int64_t n, const float* keys, int64_t key_row,
          int64_t count, float* out) {
  SKV_FOR_ROWS(dots, x, n, keys, key_row, count, out)
}

}  // namespace skv
