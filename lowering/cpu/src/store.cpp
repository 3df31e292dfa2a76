// ``skv::append`` and ``skv::retain`` of one token a row: what the references do, without a tensor
// made on the way.

#include <cmath>

#include "abi.h"
#include "vec.h"

namespace skv {
namespace {

// Keys and values of a token may be stored if every number is finite.
bool finite(const void* x, int64_t at, int64_t n, int64_t dtype) {
  if (dtype == FLOAT32) {
    const uint32_t* bits = (const uint32_t*)x + at;
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; i++) bad |= (bits[i] & 0x7f800000) == 0x7f800000;
    return !bad;
  }
  const uint16_t* bits = (const uint16_t*)x + at;
  const uint16_t all = dtype == BFLOAT16 ? 0x7f80 : 0x7c00;
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; i++) bad |= (bits[i] & all) == all;
  return !bad;
}

bool visible(const Append& a, int64_t b, int64_t slot) {
  for (int64_t h = 0; h < a.mask_heads; h++) {
    const int64_t at = b * a.mask_b + h * a.mask_h + slot;
    if (a.mask_kind == 3) {
      if (((const uint8_t*)a.mask)[at]) return true;
    } else {
      float x;
      to_floats(a.mask, at, 1, a.mask_kind, &x);
      if (x > a.hidden) return true;
    }
  }
  return false;
}

struct Row {
  int64_t pad, length, coded, lead;
};

// What a row leads to; false where the reference has something to say.
bool row_of(const Append& a, int64_t b, Row& row) {
  const int64_t *meta = a.meta + 4 * b, start = a.position[0];
  row = {meta[0], meta[1], meta[2], 0};
  if (start == 0 && row.pad + row.length > 0) row = {0, 0, 0, 0};
  if (start < row.pad + row.length) row.length = start - row.pad;  // a rewind
  if (row.length < row.coded + (row.coded > 0 ? a.sinks : 0)) return false;
  if (row.length < 0) row.pad += row.length, row.length = 0;
  if (row.pad + row.length != start) return false;
  if (a.mask_kind >= 0 && row.length == 0) {
    const int64_t slot = start < a.slots ? start : a.slots - 1;
    row.lead = !visible(a, b, slot);
  }
  const int64_t waits = row.length + 1 - row.lead - a.sinks;
  if ((waits > 0 ? waits : 0) - row.coded > a.ring || start + 1 > a.max_tokens) return false;
  if (row.lead) return true;
  for (int64_t h = 0; h < a.heads; h++)
    if (!finite(a.k, b * a.k_b + h * a.k_h, a.dim, a.dtype) ||
        !finite(a.v, b * a.v_b + h * a.v_h, a.dim, a.dtype))
      return false;
  return true;
}

}  // namespace
}  // namespace skv

// 1, or 0 with nothing written where the reference has an error to raise.
SKV_EXPORT int64_t skv_append(const Append* given) {
  using namespace skv;
  const Append& a = *given;
  Row row;
  for (int64_t b = 0; b < a.batch; b++)
    if (!row_of(a, b, row)) return 0;
  const int64_t size = a.dtype == FLOAT32 ? 4 : 2;
  for (int64_t b = 0; b < a.batch; b++) {
    row_of(a, b, row);
    int64_t* meta = a.meta + 4 * b;
    if (!row.lead) {
      const int64_t i = row.length - a.sinks;
      const int64_t slot = i < 0 ? row.length : a.sinks + i % a.ring;
      for (int64_t h = 0; h < a.heads; h++) {
        const int64_t to = ((b * a.heads + h) * (a.sinks + a.ring) + slot) * a.dim;
        std::memcpy((uint8_t*)a.exact_keys + to * size,
                    (const uint8_t*)a.k + (b * a.k_b + h * a.k_h) * size, a.dim * size);
        std::memcpy((uint8_t*)a.exact_values + to * size,
                    (const uint8_t*)a.v + (b * a.v_b + h * a.v_h) * size, a.dim * size);
      }
    }
    meta[0] = row.pad + row.lead;
    meta[1] = row.length + 1 - row.lead;
    meta[2] = row.coded;
  }
  return 1;
}

SKV_EXPORT void skv_retain(const Retain* given) {
  using namespace skv;
  const Retain& a = *given;
  const int64_t size = a.dtype == FLOAT32 ? 4 : 2;
  for (int64_t b = 0; b < a.batch; b++) {
    const int64_t i = a.position[0] - (a.position[0] == 0 ? 0 : a.meta[4 * b]) - a.sinks;
    if (i < 0 || i % a.every != a.every - 1) continue;
    for (int64_t h = 0; h < a.q_heads; h++) {
      const int64_t to = ((b * a.q_heads + h) * a.observed + i / a.every % a.observed) * a.dim;
      std::memcpy((uint8_t*)a.queries + to * size,
                  (const uint8_t*)a.q + (b * a.q_b + h * a.q_h) * size, a.dim * size);
    }
  }
}
