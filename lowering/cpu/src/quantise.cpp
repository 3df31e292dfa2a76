// Vectors in their frame to digits and radii: ``codes.best_gain``, ``codes.radius_of`` and the
// packing behind them, a vector of dimensions at a time.

#include <omp.h>

#include <algorithm>
#include <cmath>

#include "abi.h"
#include "arena.h"
#include "vec.h"

namespace skv {
namespace {

constexpr float GAINS[] = {SKV_GAINS};

F32 whole_below(F32 x) {
  F32 n = to_float(to_int(x));
  return n > x ? n - splat(1.0f) : n;
}

// The grid's value for ``unit``, and its code.
F32 on_grid(F32 unit, F32 step, F32 levels, F32& code) {
  F32 x = unit / step + levels * splat(0.5f);
  const F32 last = levels - splat(1.0f);
  x = x > F32{} ? x : F32{};  // before it becomes an integer, so that none overflows
  x = x > last ? last : x;
  code = whole_below(x);
  return step * (code - last * splat(0.5f));
}

uint8_t log_code(float x) {
  if (!(x > 0)) return 0;
  const float code = std::nearbyint(std::log2(x) * SKV_RADIUS_STEPS) + SKV_RADIUS_ONE;
  return (uint8_t)std::min(std::max(code, 0.0f), 255.0f);
}

}  // namespace
}  // namespace skv

SKV_EXPORT void skv_quantise(const Quantise* given) {
  using namespace skv;
  const Quantise& a = *given;
  const int64_t dim = a.dim, width = (dim + LANES - 1) / LANES * LANES;
#pragma omp parallel num_threads(a.threads)
  {
    Buffer<float> z(width), step(width), levels(width), weight(width), chosen(width);
    Buffer<int32_t> code(width);
    std::fill_n((float*)z, width, 0.0f);
    int64_t head = -1;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < a.batch * a.heads * a.count; n++) {
      const int64_t h = n / a.count % a.heads;
      if (head != h) {
        head = h;
        const float* grid = a.grid + h * a.grid_h;
        std::fill_n((float*)step, width, 1.0f);
        std::fill_n((float*)levels, width, 1.0f);
        std::fill_n((float*)weight, width, 0.0f);
        std::copy_n(grid, dim, (float*)step);
        std::copy_n(grid + dim, dim, (float*)levels);
        std::copy_n(grid + 2 * dim, dim, (float*)weight);
      }
      std::copy_n(a.z + n * dim, dim, (float*)z);
      F32 squares = {};
      for (int64_t d = 0; d < width; d += LANES) squares += load<F32>(z + d) * load<F32>(z + d);
      const float length = std::sqrt(sum(squares) / dim);
      const float per = length > 0 ? length : 1.0f;
      float best = 0, gain = 0;
      for (float tried : GAINS) {
        F32 along = {}, energy = {}, unused;
        for (int64_t d = 0; d < width; d += LANES) {
          const F32 w = load<F32>(weight + d), unit = load<F32>(z + d) / splat(per);
          const F32 on =
              on_grid(unit / splat(tried), load<F32>(step + d), load<F32>(levels + d), unused);
          along += w * unit * on;
          energy += w * on * on;
        }
        const float a1 = sum(along), fit = a1 * std::abs(a1) / std::max(sum(energy), 1e-30f);
        if (gain == 0 || fit > best) best = fit, gain = tried;
      }
      F32 along = {}, energy = {}, own = {};
      for (int64_t d = 0; d < width; d += LANES) {
        const F32 w = load<F32>(weight + d), x = load<F32>(z + d);
        F32 c;
        const F32 on =
            on_grid(x / splat(per) / splat(gain), load<F32>(step + d), load<F32>(levels + d), c);
        store(code + d, to_int(c));
        along += w * x * on;
        energy += w * on * on;
        own += w * x * x;
      }
      const float to = sum(along);
      float radius = to / sum(energy);
      if (a.unbiased) radius = std::min(sum(own) / to, (float)SKV_CAP * radius);
      if (!(to > 0) || !std::isfinite(radius)) radius = length;
      a.radius[n] = length > 0 ? log_code(radius) : 0;
      const uint8_t *dims = a.plan + h * a.plan_h, *shifts = dims + a.plan_r;
      uint8_t* out = a.digits + n * (a.n_digits / 4);
      for (int64_t g = 0; g < a.n_digits; g += 4) {
        uint32_t byte = 0;
        for (int j = 0; j < 4; j++) byte |= (code[dims[g + j]] >> shifts[g + j] & 3) << 2 * j;
        out[g / 4] = byte;
      }
    }
  }
}
