// ``skv::attend`` from codes. For every kv head and row of the batch:
//
// 1. ``collect`` cuts its pages into runs of tokens of one block and tier, and runs into tasks.
//    The cuts depend on what is stored alone, so a result does not depend on the threads.
// 2. ``Worker::codes`` attends to the tokens of a task. Queries are turned by each block's start,
//    taken through the transform, and rounded to 16 bits; so are attention weights. Codes meet them
//    as integers, two a lane: keys with a token in every lane, values with a word in every lane.
//    ``Worker::exact`` attends to sinks, window and the forward's own tokens.
// 3. ``merge`` adds the parts up, in their order, and takes what was summed back to vectors.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "products.h"
#include "queries.h"
#include "runs.h"

namespace skv {
namespace {


constexpr int AHEAD = 2;  // runs of tokens that memory is asked for before they are worked on

// ------------------------------------------------------------ a thread

class Worker {
 public:
  explicit Worker(const Attend& a)
      : a(a), tiers((const Tier*)a.tiers), rows(a.group * a.tokens), dim(a.dim),
        most_values(most(a, &Tier::value_words)), queries(a), unit(rows), top(rows), total(rows),
        shrink(rows), seen(a.tokens * BATCH), key_radius(BATCH), value_radius(BATCH),
        logits(rows * BATCH), exact_keys(BATCH * dim), exact_values(BATCH * dim),
        products(TILE * BATCH), weights(rows * BATCH), value_plan(a.value_digits),
        key_words(most(a, &Tier::key_dwords) * BATCH), value_pairs(BATCH / 2 * most_values),
        sums(a.n_tiers * rows * 8 * most_values), minus(a.n_tiers * rows),
        base(a.n_tiers * rows), none(8 * most_values, 0) {
    // Lanes without a token.
    std::fill_n((uint32_t*)key_words, most(a, &Tier::key_dwords) * BATCH, 0);
  }

  // Part [rows, 2 + D] of a task: greatest logit, sum of weights, sum in the values' frame.
  void codes(int64_t group, const Run* runs, int64_t count, float* part) {
    begin(group);
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

  // The same of what is exact, in the vectors' own space.
  void exact(int64_t group, float* part) {
    begin(group);
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
  static int64_t most(const Attend& a, int64_t (Tier::*size)() const) {
    int64_t found = 0;
    for (int64_t t = 0; t < a.n_tiers; t++)
      found = std::max(found, (((const Tier*)a.tiers)[t].*size)());
    return found;
  }

  const Attend& a;
  const Tier* tiers;
  const int64_t rows, dim;
  const int64_t most_values;
  int64_t group = 0, tier = 0, batch = 0, head = -1;
  Past past{a, 0};
  Queries queries;
  Ahead ahead;
  Buffer<float> unit, top, total, shrink;
  Buffer<float> seen;  // [T, BATCH]: what the mask adds
  Buffer<float> key_radius, value_radius, logits, exact_keys, exact_values;
  Buffer<int32_t> products;
  Buffer<int16_t> weights;
  Plan value_plan;
  Buffer<uint32_t> key_words, value_pairs;
  Buffer<float> sums, minus, base;
  std::vector<uint8_t> none;  // a value of no token
  const uint8_t* value_at[BATCH + 1];
  int64_t token[BATCH];  // of those that are taken next

  // Rows of the tile that begins at r.
  int64_t tile(int64_t r) const { return std::min<int64_t>(TILE, rows - r); }

  const void* mask_row(int64_t t) const {
    const int64_t size = a.mask_kind == 3 ? 1 : a.mask_kind == FLOAT32 ? 4 : 2;
    return (const uint8_t*)a.mask + (group / a.heads * a.mask_b + t * a.mask_t) * size;
  }

  // Keys and values of ``token`` [count], which begin at elements and are rows so far apart.
  void dense(const void* k, int64_t k_at, int64_t k_row, const void* v, int64_t v_at,
             int64_t v_row, int64_t count, float* part) {
    if (count == 0) return;
    const float *keys_at = (const float*)k + k_at, *values_at = (const float*)v + v_at;
    if (a.dtype != FLOAT32) {
      for (int64_t n = 0; n < count; n++) {
        to_floats(k, k_at + n * k_row, dim, a.dtype, exact_keys + n * dim);
        to_floats(v, v_at + n * v_row, dim, a.dtype, exact_values + n * dim);
      }
      keys_at = exact_keys, values_at = exact_values;
      k_row = v_row = dim;
    }
    const int64_t padded = up(count, LANES);
    for (int64_t n = 0; n < count; n++) show(n, token[n] + past.pad);
    for (int64_t n = count; n < padded; n++) hide(n);
    for (int64_t r = 0; r < rows; r++)
      std::copy_n(seen + r % a.tokens * BATCH, padded, logits + r * BATCH);
    for (int64_t r = 0; r < rows; r += TILE)
      dots(tile(r), queries.q + r * dim, dim, keys_at, k_row, count, logits + r * BATCH);
    for (int64_t r = 0; r < rows; r++) {
      if (!soften(r, padded))
        std::fill_n(logits + r * BATCH, padded, 0.0f);
      else if (shrink[r] != 1.0f)
        for (int64_t d = 0; d < dim; d++) part[r * (2 + dim) + 2 + d] *= shrink[r];
    }
    for (int64_t r = 0; r < rows; r += TILE)
      product(tile(r), logits + r * BATCH, BATCH, count, values_at, v_row, dim,
              part + r * (2 + dim) + 2, 2 + dim);
  }

  void begin(int64_t of) {
    group = of, batch = 0;
    past = Past(a, group / a.heads);
    queries.begin(group);
    for (int64_t r = 0; r < rows; r++) {
      top[r] = NONE, total[r] = 0;
    }
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

  // Logits [rows, padded] to weights in powers of two above the greatest so far; whether there is
  // anything to see.
  bool soften(int64_t r, int64_t padded) {
    float* x = logits + r * BATCH;
    F32 most = load<F32>(x);
    for (int64_t n = LANES; n < padded; n += LANES) most = max(most, load<F32>(x + n));
    const float here = max_of(most);
    const float now = here == here ? std::max(top[r], here) : 0.0f;  // NaN stays in the total
    if (now == NONE) return false;
    shrink[r] = top[r] == now ? 1.0f : std::exp2(top[r] - now);
    top[r] = now;
    F32 sums = {};
    for (int64_t n = 0; n < padded; n += LANES) {
      F32 p = exp2_of(load<F32>(x + n) - splat(now));
      store(x + n, p);
      sums += p;
    }
    total[r] = total[r] * shrink[r] + sum(sums);
    return true;
  }

  // Attend to the tokens that were gathered.
  void flush() {
    if (batch == 0) return;
    const Tier& now = tiers[tier];
    const int64_t padded = up(batch, LANES), dwords = now.key_dwords(), words = now.value_words();
    for (int64_t n = batch; n < padded; n++) {
      hide(n);
      key_radius[n] = value_radius[n] = 0;
    }
    for (int64_t r = 0; r < rows; r += TILE) {
      logits_of(tile(r), key_words, dwords, batch, queries.pairs + r * dwords * 8, products, ahead);
      for (int j = 0; j < tile(r); j++) scale_logits(r + j, products + j * BATCH, padded);
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

  void scale_logits(int64_t r, const int32_t* from, int64_t padded) {
    const float* bias = seen + r % a.tokens * BATCH;
    for (int64_t n = 0; n < padded; n += LANES) {
      F32 x = to_float(load<I32>(from + n)) * splat(queries.step[r]) - splat(queries.offset[r]);
      store(logits + r * BATCH + n,
            x * load<F32>(key_radius + n) + (splat(queries.term[r]) + load<F32>(bias + n)));
    }
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
    if (!soften(r, padded)) {
      std::fill_n(out, padded, 0);
      if (base[tier * rows + r] == NONE)  // the product adds nothing, but to numbers
        std::fill_n(sums + (tier * rows + r) * 8 * most_values, 8 * tiers[tier].value_words(),
                    0.0f);
      return;
    }
    float* p = logits + r * BATCH;
    F32 most = {};
    for (int64_t n = 0; n < padded; n += LANES) {
      F32 w = load<F32>(p + n) * load<F32>(value_radius + n);
      store(p + n, w);
      most = max(most, w);
    }
    const float largest = max_of(most);
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

// ------------------------------------------------------------ parts

// ``parts``: of tasks [count, rows, 2 + D], and that of what is exact.
void merge(const Attend& a, int64_t group, const float* parts, int64_t count, const float* exact,
           Transform& values) {
  const int64_t rows = a.group * a.tokens, dim = a.dim, size = 2 + dim;
  if (count) values.read(a, a.value_back, group % a.heads, false);
  Buffer<float> sum(rows * dim), out(rows * dim), coded(rows), top(rows);
  std::fill_n((float*)sum, rows * dim, 0.0f);
  std::fill_n((float*)out, rows * dim, 0.0f);
  auto share = [&](int64_t r, float of) { return of == NONE ? 0.0f : std::exp2(of - top[r]); };
  for (int64_t r = 0; r < rows; r++) {
    top[r] = exact[r * size], coded[r] = 0;
    for (int64_t n = 0; n < count; n++) top[r] = std::max(top[r], parts[(n * rows + r) * size]);
    for (int64_t n = 0; n < count; n++) {
      const float *part = parts + (n * rows + r) * size, by = share(r, part[0]);
      coded[r] += part[1] * by;
      for (int64_t d = 0; d < dim; d++) sum[r * dim + d] += part[2 + d] * by;
    }
  }
  if (count)
    for (int64_t r = 0; r < rows; r += TILE)
      product(std::min<int64_t>(TILE, rows - r), sum + r * dim, dim, dim, values.matrix, dim, dim,
              out + r * dim, dim);
  for (int64_t r = 0; r < rows; r++) {
    float* to = out + r * dim;
    const float *part = exact + r * size, by = share(r, part[0]);
    const float total = coded[r] + part[1] * by, per = total == 0 ? 1.0f : 1.0f / total;
    for (int64_t d = 0; d < dim; d++) {
      const float centre = count ? coded[r] * values.centre[d] : 0.0f;
      to[d] = (to[d] + centre + part[2 + d] * by) * per;
    }
    const int64_t b = group / a.heads, head = group % a.heads * a.group + r / a.tokens;
    const int64_t at = ((b * a.heads * a.group + head) * a.tokens + r % a.tokens) * dim;
    from_floats(to, a.out, at, dim, a.dtype);
  }
}

}  // namespace
}  // namespace skv

SKV_EXPORT void skv_attend(const Attend* given) {
  using namespace skv;
  const Attend& a = *given;
  const int64_t groups = a.batch * a.heads, size = a.group * a.tokens * (2 + a.dim);
  std::vector<std::vector<Run>> runs(groups);
  std::vector<Task> tasks;
  std::vector<int64_t> first(groups + 1);
  std::unique_ptr<float[]> parts;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; g++) collect(a, g, runs[g]);
#pragma omp single
    {
      for (int64_t g = 0; g < groups; g++) {
        first[g] = tasks.size();
        cut(runs[g], g, a.n_tiers, tasks);
      }
      first[groups] = tasks.size();
      for (int64_t g = 0; g < groups; g++) tasks.push_back({(int32_t)g, 0, 0});
      parts.reset(new float[tasks.size() * size]);
    }
    Worker worker(a);
    // Some at a time: those of a head share its transform.
    const int64_t share = std::max<int64_t>(1, tasks.size() / (4 * a.threads));
#pragma omp for schedule(dynamic, share)
    for (int64_t n = 0; n < (int64_t)tasks.size(); n++) {
      const Task& task = tasks[n];
      float* part = parts.get() + n * size;
      if (task.first == task.last)
        worker.exact(task.group, part);
      else
        worker.codes(task.group, &runs[task.group][task.first], task.last - task.first, part);
    }
    Transform values(a.dim);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++)
      merge(a, g, parts.get() + first[g] * size, first[g + 1] - first[g],
            parts.get() + (first[groups] + g) * size, values);
  }
}
