// What a forward attends to: pages cut into runs of one block and tier, and runs into tasks.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "abi.h"
#include "vec.h"

namespace skv {

constexpr int TASK_TOKENS = 1024;  // of a task, about
constexpr int PER_TIER = 1 << 16, GAP_FILLER = 255;

struct Tier {
  int64_t capacity, keys, values, key_radius, value_radius, gap, nk, nv, key_first, value_first;

  int64_t key_dwords() const { return (nk + 15) / 16; }
  // 16-bit words of a value, as many as vectors are filled by.
  int64_t value_words() const { return up(nv / 8, LANES); }
};

// What a row of the batch brings, as the reference reads it from ``meta``.
struct Past {
  int64_t pad, length, coded;

  Past(const Attend& a, int64_t b) {
    const int64_t *meta = a.meta + 4 * b, start = a.position[0];
    pad = start == 0 ? 0 : meta[0];
    length = std::min(meta[1], std::max<int64_t>(start - pad, 0));
    coded = start == 0 ? 0 : meta[2];
  }
};

// Slots of a page that follow one another and are of one block. ``before``: where tokens are
// tracked, the i that the first gap is counted from, else the i of the first.
struct Run {
  int32_t page, first, count, before, key;
};

struct Task {
  int32_t group, first, last;  // first == last: what is exact
};

static float radius_of(int code) {
  return code ? std::exp2((code - SKV_RADIUS_ONE) / (float)SKV_RADIUS_STEPS) : 0.0f;
}

struct Radii {
  float of[256];
  Radii() {
    for (int code = 0; code < 256; code++) of[code] = radius_of(code);
  }
};
static const Radii RADII;

static void split(const Attend& a, const Tier& tier, int64_t page, int tiers, int tier_index,
                  int used, std::vector<Run>& runs) {
  const uint8_t* __restrict gap = a.pool + page * a.page_bytes + tier.gap;
  int64_t i = a.info[2 * page], before = i, end = 0, block = -1;
  Run* run = nullptr;
  if (a.tracked) {  // most pages are of one block
    int64_t last = i;
    for (int slot = 0; slot < used; slot++) last += gap[slot];
    const int64_t low = a.block ? (i + gap[0]) / a.block : 0, high = a.block ? last / a.block : 0;
    if (used && low == high) {
      runs.push_back({(int32_t)page, 0, used, (int32_t)i, (int32_t)(low * tiers + tier_index)});
      return;
    }
  }
  for (int slot = 0; slot < used;) {
    if (a.tracked) i += gap[slot];
    if (i >= end || run == nullptr) {
      block = a.block ? i / a.block : 0;
      end = a.block ? (block + 1) * a.block : std::numeric_limits<int64_t>::max();
      const int32_t key = block * tiers + tier_index;
      runs.push_back({(int32_t)page, slot, 0, (int32_t)before, key});
      run = &runs.back();
    }
    if (a.tracked) {
      run->count++, slot++;
      before = i;
    } else {
      int64_t count = std::min<int64_t>(used - slot, end - i);
      run->count = count, slot += count, i += count;
      before = i;
    }
  }
}

// The runs of a group, by block and tier, in order.
static void collect(const Attend& a, int64_t group, std::vector<Run>& sorted) {
  const Tier* tiers = (const Tier*)a.tiers;
  const int32_t* table = a.table + group * a.max_pages;
  const Past past(a, group / a.heads);
  std::vector<Run> runs;
  for (int64_t n = 0; n < a.max_pages; n++) {
    if (a.tracked && n + 8 < a.max_pages && table[n + 8] >= 0) {
      const int64_t soon = table[n + 8], of = a.info[2 * soon + 1] / PER_TIER;
      __builtin_prefetch(a.pool + soon * a.page_bytes + tiers[of].gap);
    }
    int64_t page = table[n];
    if (page < 0 || a.info[2 * page] >= past.coded) continue;
    int tier = a.info[2 * page + 1] / PER_TIER, used = a.info[2 * page + 1] % PER_TIER;
    split(a, tiers[tier], page, a.n_tiers, tier, used, runs);
  }
  // A counting sort: it keeps the order of tokens.
  int32_t most = 0;
  for (const Run& run : runs) most = std::max(most, run.key);
  std::vector<int32_t> place(most + 2, 0);
  for (const Run& run : runs) place[run.key + 1]++;
  for (int32_t key = 0; key <= most; key++) place[key + 1] += place[key];
  sorted.resize(runs.size());
  for (const Run& run : runs) sorted[place[run.key]++] = run;
}

static void cut(const std::vector<Run>& runs, int64_t group, int64_t tiers,
                std::vector<Task>& tasks) {
  int64_t tokens = 0;
  for (size_t n = 0, first = 0; n < runs.size(); n++) {
    tokens += runs[n].count;
    bool last = n + 1 == runs.size();
    bool block_ends = last || runs[n + 1].key / tiers != runs[n].key / tiers;
    if (last || (tokens >= TASK_TOKENS && block_ends) || tokens >= 2 * TASK_TOKENS) {
      tasks.push_back({(int32_t)group, (int32_t)first, (int32_t)n + 1});
      first = n + 1, tokens = 0;
    }
  }
}

}  // namespace skv
