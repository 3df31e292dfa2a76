// Products of codes and of floats, for a tile of ``rows`` <= TILE query rows.
#pragma once

#include <algorithm>

#include "vec.h"

namespace skv {

constexpr int BATCH = 128;  // tokens that are worked on at once
constexpr int TILE = 4;     // query rows that share what is loaded

// Memory that will be read soon, asked for a line at a time between products.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;

  void step() {
    if (at < end) __builtin_prefetch(at), at += 64;
  }
};

constexpr int PANEL = 2 * LANES;  // columns that a tile of rows meets at once

// The transpose of ``from`` [n, n] as panels [n / PANEL, n, PANEL], each read from end to end; the
// last may be half.
static inline void pack_transposed(const float* from, int64_t n, float* to) {
  for (int64_t c = 0; c < n; c += PANEL) {
    const int64_t wide = std::min<int64_t>(PANEL, n - c);
    transpose(from + c * n, 4 * n, wide, n, to + c * n, wide);
  }
}

// ``out`` [rows, BATCH] of keys ``words`` [dwords, BATCH], a token a lane, and of ``queries``
// [dwords, 8, TILE].
void logits_of(int64_t rows, const uint32_t* words, int64_t dwords, int64_t tokens,
               const int32_t* queries, int32_t* out, Ahead& ahead);

// ``sums`` [rows, 8, words], rows ``stride`` apart, += unit * sum over pairs of tokens of values
// ``pairs`` [count, words], a word a lane, with weights [rows, BATCH / 2] (of two tokens each).
void sums_of(int64_t rows, const uint32_t* pairs, int64_t count, int64_t words,
             const int32_t* weights, const float* unit, float* sums, int64_t stride);

// ``out`` [rows, m] += x [rows, n] @ matrix [n, m], rows so far apart; m is a multiple of LANES.
void product(int64_t rows, const float* x, int64_t x_row, int64_t n, const float* matrix,
             int64_t matrix_row, int64_t m, float* out, int64_t out_row);

// ``out`` [rows, BATCH] += the products of x [rows, n] and keys [count, n], rows so far apart.
void dots(int64_t rows, const float* x, int64_t n, const float* keys, int64_t key_row,
          int64_t count, float* out);

}  // namespace skv
