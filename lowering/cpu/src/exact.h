// Attention to what is exact: sinks, window and the forward's own tokens.
#pragma once

#include <algorithm>

#include "queries.h"
#include "softmax.h"

namespace skv {

class Exact : Softmax {
 public:
  Exact(const Attend& a, Queries& queries)
      : Softmax(a), dim(a.dim), queries(queries), keys(BATCH * dim), values(BATCH * dim) {}

  // Part [rows, 2 + D] of a group: greatest logit, sum of weights, sum of values.
  void operator()(int64_t of, float* part) {
    begin(of);
    queries.begin(of);
    std::fill_n(part, rows * (2 + dim), 0.0f);
    const int64_t h = group % a.heads, b = group / a.heads, region = group * (a.sinks + a.ring);
    const int64_t sinks = std::min(a.sinks, past.length);
    for (int64_t t = 0; t < sinks;) {
      const int64_t count = std::min<int64_t>(sinks - t, BATCH), at = (region + t) * dim;
      for (int64_t n = 0; n < count; n++) token[n] = t + n;
      dense(a.exact_keys, at, dim, a.exact_values, at, dim, count, part);
      t += count;
    }
    // The ring holds the last of i, as many as have not left it; they wrap around its end.
    const int64_t last = std::max<int64_t>(past.length - a.sinks, 0);
    for (int64_t i = std::max(past.coded, last - a.ring); i < last;) {
      const int64_t slot = i % a.ring;
      const int64_t count = std::min<int64_t>({last - i, a.ring - slot, BATCH});
      const int64_t at = (region + a.sinks + slot) * dim;
      for (int64_t n = 0; n < count; n++) token[n] = i + n + a.sinks;
      dense(a.exact_keys, at, dim, a.exact_values, at, dim, count, part);
      i += count;
    }
    for (int64_t t = 0; t < a.tokens; t++) token[t] = a.position[t] - past.pad;
    dense(a.k, b * a.k_b + h * a.k_h, a.k_t, a.v, b * a.v_b + h * a.v_h, a.v_t, a.tokens, part);
    for (int64_t r = 0; r < rows; r++) {
      part[r * (2 + dim)] = top[r];
      part[r * (2 + dim) + 1] = total[r];
    }
  }

 private:
  const int64_t dim;
  Queries& queries;
  Buffer<float> keys, values;  // of a batch, where they are not of 32 bits
  int64_t token[BATCH];        // of those that are taken next

  // Keys and values of ``token`` [count], which begin at elements and are rows so far apart.
  void dense(const void* k, int64_t k_at, int64_t k_row, const void* v, int64_t v_at,
             int64_t v_row, int64_t count, float* part) {
    if (count == 0) return;
    const float *keys_at = (const float*)k + k_at, *values_at = (const float*)v + v_at;
    if (a.dtype != FLOAT32) {
      for (int64_t n = 0; n < count; n++) {
        to_floats(k, k_at + n * k_row, dim, a.dtype, keys + n * dim);
        to_floats(v, v_at + n * v_row, dim, a.dtype, values + n * dim);
      }
      keys_at = keys, values_at = values;
      k_row = v_row = dim;
    }
    const int64_t padded = up(count, 2 * LANES);
    for (int64_t n = 0; n < count; n++) show(n, token[n] + past.pad);
    for (int64_t n = count; n < padded; n++) hide(n);
    for (int64_t r = 0; r < rows; r++)
      std::copy_n(seen + r % a.tokens * BATCH, padded, logits + r * BATCH);
    for (int64_t r = 0; r < rows; r += TILE)
      dots(tile(r), queries.q + r * dim, dim, keys_at, k_row, count, logits + r * BATCH);
    for (int64_t r = 0; r < rows; r++) {
      F32 most = splat(NONE);
      for (int64_t n = 0; n < padded; n += LANES) most = max(most, load<F32>(logits + r * BATCH + n));
      if (!rise(r, max_of(most))) {
        std::fill_n(logits + r * BATCH, padded, 0.0f);
        continue;
      }
      soften(r, padded, nullptr);
      if (shrink[r] != 1.0f)
        for (int64_t d = 0; d < dim; d++) part[r * (2 + dim) + 2 + d] *= shrink[r];
    }
    for (int64_t r = 0; r < rows; r += TILE)
      product(tile(r), logits + r * BATCH, BATCH, count, values_at, v_row, dim,
              part + r * (2 + dim) + 2, 2 + dim);
  }
};

}  // namespace skv
