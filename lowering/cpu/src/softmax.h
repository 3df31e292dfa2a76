// The softmax of a kv head's query rows, over tokens that come batch by batch.
#pragma once

#include <algorithm>
#include <cmath>

#include "arena.h"
#include "products.h"
#include "runs.h"

namespace skv {

class Softmax {
 public:
  explicit Softmax(const Attend& a)
      : a(a), rows(a.group * a.tokens), top(rows), total(rows), shrink(rows),
        seen(a.tokens * BATCH), logits(rows * BATCH) {}

 protected:
  const Attend& a;
  const int64_t rows;
  int64_t group = 0;
  Past past{a, 0};
  Buffer<float> top, total;  // of a row: greatest logit so far, sum of weights
  Buffer<float> shrink;      // what ``rise`` takes everything summed so far down by
  Buffer<float> seen;        // [T, BATCH]: what the mask adds
  Buffer<float> logits;      // [rows, BATCH], in powers of two

  // Rows of the tile that begins at r.
  int64_t tile(int64_t r) const { return std::min<int64_t>(TILE, rows - r); }

  void begin(int64_t of) {
    group = of;
    past = Past(a, group / a.heads);
    for (int64_t r = 0; r < rows; r++) top[r] = NONE, total[r] = 0;
  }

  // What the mask says of a slot to every query of the forward, in powers of two.
  void show(int64_t n, int64_t slot) {
    slot = std::min(std::max<int64_t>(slot, 0), a.slots - 1);
    for (int64_t t = 0; t < a.tokens; t++) {
      float bias = 0;
      if (a.mask_kind == 3) {
        bias = ((const uint8_t*)mask_row(t))[slot] ? 0.0f : NONE;
      } else if (a.mask_kind >= 0) {
        to_floats(mask_row(t), slot, 1, a.mask_kind, &bias);
        bias = bias > a.hidden ? bias * LOG2E : NONE;
      }
      seen[t * BATCH + n] = bias;
    }
  }

  void hide(int64_t n) {
    for (int64_t t = 0; t < a.tokens; t++) seen[t * BATCH + n] = NONE;
  }

  // Let the greatest logit of a row so far rise to ``here``; whether there is anything to see.
  bool rise(int64_t r, float here) {
    const float now = here == here ? std::max(top[r], here) : 0.0f;  // NaN stays in the total
    if (now == NONE) return false;
    shrink[r] = top[r] == now ? 1.0f : std::exp2(top[r] - now);
    top[r] = now;
    return true;
  }

  // Logits of a row, of which ``here`` is the greatest, to weights in powers of two above the
  // greatest so far, and those times ``radius`` [padded]; the greatest of these.
  float soften(int64_t r, int64_t padded, const float* radius) {
    float* x = logits + r * BATCH;
    const F32 now = splat(top[r]);
    F32 sums[2] = {}, most[2] = {};
    for (int64_t n = 0; n < padded; n += 2 * LANES)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const int64_t i = n + j * LANES;
        F32 p = exp2_of(load<F32>(x + i) - now);
        sums[j] += p;
        if (radius) p *= load<F32>(radius + i);
        store(x + i, p);
        most[j] = max(most[j], p);
      }
    total[r] = total[r] * shrink[r] + sum(sums[0] + sums[1]);
    return max_of(max(most[0], most[1]));
  }

 private:
  const void* mask_row(int64_t t) const {
    const int64_t size = a.mask_kind == 3 ? 1 : a.mask_kind == FLOAT32 ? 4 : 2;
    return (const uint8_t*)a.mask + (group / a.heads * a.mask_b + t * a.mask_t) * size;
  }
};

}  // namespace skv
