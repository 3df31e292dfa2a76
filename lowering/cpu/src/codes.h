// Attention from codes. Queries are turned by each block's start, taken through the transform, and
// rounded to 16 bits; so are attention weights. Codes meet them as integers, two a lane: keys with a
// token in every lane, values with a word in every lane.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "queries.h"
#include "softmax.h"

namespace skv {

constexpr int AHEAD = 2;  // runs of tokens that memory is asked for before they are worked on

class Codes : Softmax {
 public:
  Codes(const Attend& a, Queries& queries)
      : Softmax(a), tiers((const Tier*)a.tiers), dim(a.dim),
        most_values(most(a, &Tier::value_words)), queries(queries), unit(rows), greatest(rows),
        key_radius(BATCH), value_radius(BATCH), products(TILE * BATCH), weights(rows * BATCH),
        value_plan(a.value_digits), key_words(most(a, &Tier::key_dwords) * BATCH), value_pairs(BATCH / 2 * most_values),
        sums(a.n_tiers * rows * 8 * most_values), minus(a.n_tiers * rows),
        base(a.n_tiers * rows), none(8 * most_values, 0) {
    // Lanes without a token.
    std::fill_n((uint32_t*)key_words, most(a, &Tier::key_dwords) * BATCH, 0);
  }

  // Part [rows, 2 + D] of a task: greatest logit, sum of weights, sum in the values' frame.
  void operator()(int64_t of, const Run* runs, int64_t count, float* part) {
    begin(of);
    batch = 0;
    queries.begin(of);
    queries.read(group % a.heads);
    read_values(group % a.heads);
    std::fill_n((float*)base, a.n_tiers * rows, NONE);  // nothing has been summed
    int64_t block = -1, at = -1, known = 0;
    for (int64_t n = 0; n < count;) {
      const int32_t key = runs[n].key;
      if (key / a.n_tiers != block) {
        block = key / a.n_tiers;
        if (++at == known) at = 0, known = queries.turn_next(runs + n, count - n);
        queries.use(at);
      }
      tier = key % a.n_tiers;
      queries.spread(tier);
      for (; n < count && runs[n].key == key; n++) {
        if (n + AHEAD < count) look_ahead(runs[n + AHEAD].page);
        gather(runs[n]);
      }
      flush();
    }
    fold(part);
  }

 private:
  static int64_t most(const Attend& a, int64_t (Tier::*size)() const) {
    int64_t found = 0;
    for (int64_t t = 0; t < a.n_tiers; t++)
      found = std::max(found, (((const Tier*)a.tiers)[t].*size)());
    return found;
  }

  const Tier* tiers;
  const int64_t dim, most_values;
  int64_t tier = 0, batch = 0, head = -1;
  Queries& queries;
  Ahead ahead;
  Buffer<float> unit, greatest, key_radius, value_radius;
  Buffer<int32_t> products;
  Buffer<int16_t> weights;
  Plan value_plan;
  Buffer<uint32_t> key_words, value_pairs;
  Buffer<float> sums, minus, base;
  std::vector<uint8_t> none;  // a value of no token
  const uint8_t* value_at[BATCH + 1];
  int64_t token[BATCH];  // of those that are taken next

  void read_values(int64_t h) {
    if (head == h) return;
    head = h;
    for (int64_t t = 0; t < a.n_tiers; t++)
      value_plan.read(a.value_grid + h * a.n_tiers * 3 * dim,
                      a.value_plan + h * 2 * a.value_digits, t, tiers[t].value_first,
                      tiers[t].nv, dim);
  }

  void look_ahead(int64_t page) {
    while (ahead.at < ahead.end) ahead.step();
    ahead.at = a.pool + page * a.page_bytes;
    ahead.end = ahead.at + a.page_bytes;
  }

  void gather(const Run& run) {
    const Tier& now = tiers[tier];
    const uint8_t* page = a.pool + (int64_t)run.page * a.page_bytes;
    const int64_t end = run.first + run.count;
    int64_t i = run.before;
    if (!a.tracked) {
      for (int64_t slot = run.first; slot < end;) {
        const int64_t count = std::min<int64_t>({end - slot, BATCH - batch, past.coded - i});
        if (count <= 0) return;  // the rest is not of this sequence
        for (int64_t n = 0; n < count; n++) token[n] = i + n + a.sinks;
        take(now, page, slot, count);
        slot += count, i += count;
      }
      return;
    }
    const uint8_t* __restrict gap = page + now.gap;
    for (int64_t slot = run.first; slot < end;) {
      const int64_t from = slot, most = std::min<int64_t>(end, slot + BATCH - batch);
      bool live = true;
      for (; slot < most; slot++) {
        i += gap[slot];
        live = gap[slot] != GAP_FILLER && i < past.coded;
        if (!live) break;
        token[slot - from] = i + a.sinks;
      }
      if (slot > from) take(now, page, from, slot - from);
      if (!live) slot++;
    }
  }

  // Add slots of a page that follow one another, of ``token`` [count], to what is worked on next.
  void take(const Tier& now, const uint8_t* page, int64_t slot, int64_t count) {
    const uint8_t* __restrict kr = page + now.key_radius + slot;
    const uint8_t* __restrict vr = page + now.value_radius + slot;
    float* __restrict of_keys = key_radius + batch;
    float* __restrict of_values = value_radius + batch;
    for (int64_t n = 0; n < count; n++) {
      of_keys[n] = RADII.of[kr[n]];
      of_values[n] = RADII.of[vr[n]];
    }
    const int64_t key_bytes = now.nk / 4, value_bytes = now.nv / 4;
    const uint8_t* keys_at = page + now.keys + slot * key_bytes;
    transpose(keys_at, key_bytes, count, key_bytes / 4, key_words + batch, BATCH);
    if (key_bytes % 4)  // half of a word is left
      for (int64_t n = 0; n < count; n++) {
        uint16_t half;
        std::memcpy(&half, keys_at + (n + 1) * key_bytes - 2, 2);
        key_words[key_bytes / 4 * BATCH + batch + n] = half;
      }
    const uint8_t* values = page + now.values + slot * value_bytes;
    const uint8_t** __restrict at = value_at + batch;
    for (int64_t n = 0; n < count; n++) at[n] = values + n * value_bytes;
    if (a.mask_kind < 0) {
      for (int64_t t = 0; t < a.tokens; t++) std::fill_n(seen + t * BATCH + batch, count, 0.0f);
    } else {
      for (int64_t n = 0; n < count; n++) show(batch + n, token[n] + past.pad);
    }
    batch += count;
    if (batch == BATCH) flush();
  }

  // Attend to the tokens that were gathered.
  void flush() {
    if (batch == 0) return;
    const Tier& now = tiers[tier];
    const int64_t padded = up(batch, 2 * LANES), dwords = now.key_dwords(), words = now.value_words();
    for (int64_t n = batch; n < padded; n++) {
      hide(n);
      key_radius[n] = value_radius[n] = 0;
    }
    for (int64_t r = 0; r < rows; r += TILE) {
      logits_of(tile(r), key_words, dwords, batch, queries.pairs + r * dwords * 8, products, ahead);
      for (int j = 0; j < tile(r); j++)
        greatest[r + j] = scale_logits(r + j, products + j * BATCH, padded);
    }
    interleave(now, words);
    const int64_t pairs = (batch + 1) / 2;
    for (int64_t r = 0; r < rows; r++) weigh(r, padded);
    const int64_t stride = 8 * most_values;
    for (int64_t r = 0; r < rows; r += TILE)
      sums_of(tile(r), value_pairs, pairs, words, (const int32_t*)(weights + r * BATCH), unit + r,
              sums + (tier * rows + r) * stride, stride);
    batch = 0;
  }

  // Logits of a row; the greatest.
  float scale_logits(int64_t r, const int32_t* from, int64_t padded) {
    const float* bias = seen + r % a.tokens * BATCH;
    const F32 step = splat(queries.step[r]), offset = splat(queries.offset[r]);
    const F32 term = splat(queries.term[r]);
    F32 most[2] = {splat(NONE), splat(NONE)};
    for (int64_t n = 0; n < padded; n += 2 * LANES)
#pragma GCC unroll 2
      for (int j = 0; j < 2; j++) {
        const int64_t i = n + j * LANES;
        const F32 x = (to_float(load<I32>(from + i)) * step - offset) * load<F32>(key_radius + i) +
                      (term + load<F32>(bias + i));
        store(logits + r * BATCH + i, x);
        most[j] = max(most[j], x);
      }
    return max_of(max(most[0], most[1]));
  }

  // Words of two tokens side by side: [pairs, words].
  void interleave(const Tier& now, int64_t words) {
    typedef int16_t Half __attribute__((vector_size(16)));
    const int64_t size = now.nv / 4;
    value_at[batch] = none.data();
    for (int64_t p = 0; 2 * p < batch; p++) {
      const uint8_t *first = value_at[2 * p], *second = value_at[2 * p + 1];
      uint32_t* out = value_pairs + p * words;
      int64_t at = 0;
      for (; at + 16 <= size; at += 16) {
        Half x, y;
        std::memcpy(&x, first + at, 16), std::memcpy(&y, second + at, 16);
        const Half low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
        const Half high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
        std::memcpy(out + at / 2, &low, 16), std::memcpy(out + at / 2 + 4, &high, 16);
      }
      for (; at < size; at += 2) {
        uint16_t x, y;
        std::memcpy(&x, first + at, 2), std::memcpy(&y, second + at, 2);
        out[at / 2] = x | (uint32_t)y << 16;
      }
      for (int64_t w = size / 2; w < words; w++) out[w] = 0;
    }
  }

  // Attention weights of a row, times the values' radii, in 16 bits.
  void weigh(int64_t r, int64_t padded) {
    int16_t* out = weights + r * BATCH;
    unit[r] = 0;
    if (!rise(r, greatest[r])) {
      std::fill_n(out, padded, 0);
      if (base[tier * rows + r] == NONE)  // the product adds nothing, but to numbers
        std::fill_n(sums + (tier * rows + r) * 8 * most_values, 8 * tiers[tier].value_words(),
                    0.0f);
      return;
    }
    const float largest = soften(r, padded, value_radius);
    const float* p = logits + r * BATCH;
    // A row with NaN is NaN by its total, whatever its weights are.
    const bool usable = largest > 0 && total[r] == total[r];
    const F32 per = splat(usable ? MOST / largest : 0.0f);
    typedef int16_t Halves __attribute__((vector_size(2 * LANES)));
    I32 all = {};
    for (int64_t n = 0; n < padded; n += LANES) {
      const I32 x = usable ? to_int(load<F32>(p + n) * per + splat(0.5f)) : I32{};
      all += x;
      const Halves half = __builtin_convertvector(x, Halves);
      std::memcpy(out + n, &half, sizeof half);
    }
    unit[r] = largest / MOST;
    follow(tier, r);
    minus[tier * rows + r] += 1.5f * unit[r] * (float)sum(all);
  }

  // Bring what a tier has summed up to the greatest logit so far.
  void follow(int64_t of, int64_t r) {
    float& from = base[of * rows + r];
    if (from == top[r]) return;
    float* __restrict sum = sums + (of * rows + r) * 8 * most_values;
    float& less = minus[of * rows + r];
    const int64_t n = 8 * tiers[of].value_words();
    if (from == NONE) {
      std::fill_n(sum, n, 0.0f);
      less = 0;
    } else {
      const float by = std::exp2(from - top[r]);
      for (int64_t i = 0; i < n; i++) sum[i] *= by;
      less *= by;
    }
    from = top[r];
  }

  // Sums of all tiers' digits to dimensions of the frame.
  void fold(float* part) {
    std::fill_n(part, rows * (2 + dim), 0.0f);
    for (int64_t t = 0; t < a.n_tiers; t++) {
      const Tier& now = tiers[t];
      for (int64_t r = 0; r < rows; r++) {
        if (base[t * rows + r] == NONE) continue;
        follow(t, r);
        const float* sum = sums + (t * rows + r) * 8 * most_values;
        const float less = minus[t * rows + r];
        const float* __restrict by = value_plan.scale.data() + now.value_first;
        const int32_t* __restrict dim_of = value_plan.dims.data() + now.value_first;
        const int64_t words = now.value_words(), used = now.nv / 8;
        float* __restrict out = part + r * (2 + dim) + 2;
        for (int64_t w = 0; w < used; w++)
          for (int s = 0; s < 8; s++)
            out[dim_of[8 * w + s]] += (sum[s * words + w] - less) * by[8 * w + s];
      }
    }
    for (int64_t r = 0; r < rows; r++) {
      part[r * (2 + dim)] = top[r];
      part[r * (2 + dim) + 1] = total[r];
    }
  }
};

}  // namespace skv
