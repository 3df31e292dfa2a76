// Queries of a kv head as codes want them: turned by a block, taken through the keys' transform,
// and a number for each digit, in 16 bits.
#pragma once

#include <algorithm>
#include <vector>

#include "abi.h"
#include "arena.h"
#include "products.h"
#include "runs.h"

namespace skv {

constexpr float MOST = 32767.0f;  // of 16 bits
constexpr int BLOCKS = 4;         // whose queries are turned together

// What a head's frames say, as floats: ``matrix`` [D, D] and ``centre`` [D]. Of keys, through which
// queries go backwards, it is transposed and in panels.
struct Transform {
  int64_t head = -1;
  Buffer<float> matrix, centre, rows;

  explicit Transform(int64_t dim) : matrix(dim * dim), centre(dim), rows(dim * dim) {}

  void read(const Attend& a, const void* back, int64_t h, bool keys) {
    if (head == h) return;
    head = h;
    const int64_t dim = a.dim;
    const int64_t at = h * (dim + 1) * dim;
    to_floats(back, at, dim * dim, a.frame_dtype, keys ? rows : matrix);
    to_floats(back, at + dim * dim, dim, a.frame_dtype, centre);
    if (keys) pack_transposed(rows, dim, matrix);
  }
};

// The dimension of every digit of a head's tiers, and its step with the weight of its place.
struct Plan {
  std::vector<float> scale;
  std::vector<int32_t> dims;

  explicit Plan(int64_t digits) : scale(digits), dims(digits) {}

  void read(const float* grid, const uint8_t* plan, int64_t tier, int64_t first, int64_t n,
            int64_t dim) {
    for (int64_t g = first; g < first + n; g++) {
      dims[g] = plan[g];
      scale[g] = grid[tier * 3 * dim + dims[g]] * (float)(1 << plan[scale.size() + g]);
    }
  }
};

class Queries {
 public:
  const int64_t rows, dim, row_tiles;
  const float* term = nullptr;  // of the block at hand [rows]: what the keys' centre adds
  Buffer<float> q;              // [rows, D], in powers of two
  Buffer<float> step, offset;   // of the tier at hand [rows]: logit = step * product - offset
  Buffer<int32_t> pairs;        // [row_tiles, dwords, 8, TILE]: of two words' digits

  explicit Queries(const Attend& a)
      : rows(a.group * a.tokens), dim(a.dim), row_tiles(up(rows, TILE) / TILE), q(rows * dim),
        step(row_tiles * TILE), offset(row_tiles * TILE),
        pairs(row_tiles * TILE * (a.key_digits / 2 + 8)), a(a), tiers((const Tier*)a.tiers),
        keys(dim), plan(a.key_digits), partners(rows * dim), turned(BLOCKS * rows * dim),
        columns(BLOCKS * rows * dim), throughs(BLOCKS * row_tiles * TILE * dim),
        terms(BLOCKS * rows), digits(TILE * (a.key_digits + 16)) {
    std::fill_n((float*)throughs, BLOCKS * row_tiles * TILE * dim, 0.0f);  // rows there are not
  }

  // The queries of a group.
  void begin(int64_t of) {
    if (group == of) return;
    group = of;
    for (int64_t r = 0; r < rows; r++) {
      const int64_t head = group % a.heads * a.group + r / a.tokens, t = r % a.tokens;
      to_floats(a.q, group / a.heads * a.q_b + head * a.q_h + t * a.q_t, dim, a.dtype, q + r * dim);
      for (int64_t d = 0; d < dim; d++) {
        const float x = q[r * dim + d] * ((float)a.scale * LOG2E);
        q[r * dim + d] = x == x ? x : __builtin_nanf("");  // of NaNs the plain one
      }
      if (a.block)
        for (int64_t d = 0; d < dim; d++) partners[r * dim + d] = q[r * dim + a.partner[d]];
    }
  }

  // The frames of a head.
  void read(int64_t h) {
    if (keys.head == h) return;
    keys.read(a, a.key_back, h, true);
    for (int64_t t = 0; t < a.n_tiers; t++) {
      plan.read(a.key_grid + h * a.n_tiers * 3 * dim, a.key_plan + h * 2 * a.key_digits, t,
                    tiers[t].key_first, tiers[t].nk, dim);
    }
  }

  // Let the n-th of the blocks that were turned last be the one at hand.
  void use(int64_t n) {
    through = throughs + n * row_tiles * TILE * dim;
    term = terms + n * rows;
  }

  // Turn queries by the next blocks that runs are of; how many.
  int64_t turn_next(const Run* runs, int64_t count) {
    int64_t blocks[BLOCKS], found = 0;
    for (int64_t n = 0; n < count; n++) {
      const int64_t block = runs[n].key / a.n_tiers;
      if (found && blocks[found - 1] == block) continue;
      if (found == BLOCKS) break;
      blocks[found++] = block;
    }
    turn(blocks, found);
    return found;
  }

  // Queries as the keys of some blocks want them: the transform is read once for all.
  void turn(const int64_t* blocks, int64_t count) {
    const int64_t size = rows * dim;
    for (int64_t n = 0; n < count; n++) {
      const float* __restrict cosine = a.cosine + blocks[n] * dim;
      const float* __restrict sine = a.sine + blocks[n] * dim;
      for (int64_t r = 0; r < rows; r++) {
        const float* __restrict x = q + r * dim;
        const float* __restrict other = partners + r * dim;
        float* __restrict to = turned + n * size + r * dim;
        if (a.block)
          for (int64_t d = 0; d < dim; d++) to[d] = x[d] * cosine[d] + other[d] * sine[d];
        else
          std::copy_n(x, dim, to);
        F32 found = {};
        for (int64_t d = 0; d < dim; d += LANES)
          found += load<F32>(to + d) * load<F32>(keys.centre + d);
        terms[n * rows + r] = sum(found);
      }
    }
    std::fill_n((float*)columns, count * size, 0.0f);
    for (int64_t c = 0; c < dim; c += PANEL) {
      const int64_t wide = std::min<int64_t>(PANEL, dim - c);
      for (int64_t r = 0; r < count * rows; r += TILE)  // of all blocks
        product(std::min<int64_t>(TILE, count * rows - r), turned + r * dim, dim, dim,
                keys.matrix + c * dim, wide, wide, columns + r * dim + c, dim);
    }
    for (int64_t n = 0; n < count; n++)
      for (int64_t r = 0; r < rows; r += TILE)
        transpose(columns + n * size + r * dim, 4 * dim, tile(r), dim,
                  throughs + n * row_tiles * TILE * dim + r * dim, TILE);
  }

  // Queries as a tier's digits want them, in 16 bits.
  void spread(int64_t tier) {
    const Tier& now = tiers[tier];
    const int64_t dwords = now.key_dwords();
    const float* __restrict by = plan.scale.data() + now.key_first;
    const int32_t* __restrict dim_of = plan.dims.data() + now.key_first;
    float* __restrict digit = digits;
    for (int64_t g = TILE * now.nk; g < TILE * 16 * dwords; g++) digit[g] = 0;
    for (int64_t tile = 0; tile < row_tiles; tile++) {
      const float* from = through + tile * TILE * dim;
      Row32 largest = {}, finite = {};
      for (int64_t g = 0; g < now.nk; g++) {
        const Row32 x = load<Row32>(from + dim_of[g] * TILE) * by[g];
        store(digit + g * TILE, x);
        const Row32 size = x > Row32{} ? x : -x;
        largest = size > largest ? size : largest;
        finite += x * 0.0f;
      }
      const Row32 per = largest > Row32{} ? MOST / largest : Row32{};
      IRow32 sums = {};
      int32_t* __restrict out = pairs + tile * dwords * 8 * TILE;
      auto whole = [&](int64_t g) {  // to the nearest, by a sum that is positive
        const Row32 x = load<Row32>(digit + g * TILE) * per + 32768.5f;
        return (IRow32)((URow32)__builtin_convertvector(x, IRow32) - 32768);
      };
      for (int64_t d = 0; d < dwords; d++)
        for (int s = 0; s < 8; s++) {
          const IRow32 low = whole(16 * d + s), high = whole(16 * d + 8 + s);
          sums += low + high;
          store(out + (8 * d + s) * TILE, (URow32)(low & 0xffff) | (URow32)high << 16);
        }
      // Where a query is not finite, its logits are NaN.
      const Row32 unit = largest / MOST + finite;
      store(step + tile * TILE, unit);
      store(offset + tile * TILE, 1.5f * unit * __builtin_convertvector(sums, Row32));
    }
  }

 private:
  int64_t tile(int64_t r) const { return std::min<int64_t>(TILE, rows - r); }

  const Attend& a;
  const Tier* tiers;
  int64_t group = -1;
  const float* through = nullptr;  // of the block at hand [row_tiles, D, TILE]
  Transform keys;
  Plan plan;
  Buffer<float> partners, turned, columns, throughs, terms, digits;
};

}  // namespace skv
