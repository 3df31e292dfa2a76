// What Python passes: one struct a function, every field of 8 bytes. `library.py` reads the names
// and types from this file.
#pragma once

#include <cstdint>

struct Attend {
  const void *q, *k, *v;            // [B, Hq, T, D], [B, H, T, D]; rows of D are contiguous
  const void* mask;                 // [B or 1, 1, T or 1, slots]
  const int64_t* position;          // [T]
  const void *exact_keys, *exact_values;  // [B, H, sinks + ring, D]
  const int64_t* meta;              // [B, 4]
  const uint8_t* pool;              // [pages, page_bytes]
  const int32_t *info, *table;      // [pages, 2], [B, H, max_pages]
  const void* key_back;             // [H, D + 1, D]
  const float* key_grid;            // [H, n_tiers, 3, D]
  const uint8_t* key_plan;          // [H, 2, key_digits]
  const void* value_back;
  const float* value_grid;
  const uint8_t* value_plan;
  const float *cosine, *sine;       // [blocks, D]: of the turn back by a block's start
  const int32_t* partner;           // [D]
  const int64_t* tiers;             // [n_tiers, 10]: `Tier` in runs.h
  void* out;                        // [B, Hq, T, D], contiguous
  int64_t batch, heads, group, tokens, dim, dtype, frame_dtype;
  int64_t q_b, q_h, q_t, k_b, k_h, k_t, v_b, v_h, v_t;
  int64_t mask_kind, mask_b, mask_t, slots;  // kind: -1 none, 3 bool, else a `Dtype`
  int64_t sinks, ring, max_pages, page_bytes, block, tracked, n_tiers, key_digits, value_digits;
  int64_t threads;
  double scale, hidden;             // additive masks hide at `hidden` and below
};

struct Append {
  const void *k, *v, *mask;         // [B, H, 1, D]; mask [B or 1, mask_heads, 1, slots]
  const int64_t* position;
  void *exact_keys, *exact_values;
  int64_t* meta;
  int64_t batch, heads, dim, dtype, k_b, k_h, v_b, v_h;
  int64_t mask_kind, mask_b, mask_h, mask_heads, slots;
  int64_t sinks, ring, max_tokens;
  double hidden;
};

struct Retain {
  const void* q;                    // [B, Hq, 1, D]
  const int64_t* position;
  void* queries;                    // [B, Hq, observed, D]
  const int64_t* meta;
  int64_t batch, q_heads, dim, dtype, q_b, q_h, sinks, observed, every;
};

struct Quantise {
  const float *z, *grid;            // [B, H, count, D]; [H, 3, D]
  const uint8_t* plan;              // [H, 2, n_digits]
  uint8_t *digits, *radius;         // [B, H, count, n_digits / 4], [B, H, count]
  int64_t batch, heads, count, dim, n_digits, grid_h, plan_h, plan_r, unbiased, threads;
};
