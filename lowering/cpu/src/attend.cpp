// ``skv::attend`` from codes. For every kv head and row of the batch:
//
// 1. ``collect`` cuts its pages into runs of tokens of one block and tier, and runs into tasks.
//    The cuts depend on what is stored alone, so a result does not depend on the threads.
// 2. ``Codes`` attends to the tokens of a task, ``Exact`` to sinks, window and the forward's own.
// 3. ``merge`` adds the parts up, in their order, and takes what was summed back to vectors.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "codes.h"
#include "exact.h"

namespace skv {
namespace {

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
  std::unique_ptr<Buffer<float>> parts;
#pragma omp parallel num_threads(a.threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < groups; g++) collect(a, g, runs[g]);
#pragma omp master
    {
      for (int64_t g = 0; g < groups; g++) {
        first[g] = tasks.size();
        cut(runs[g], g, a.n_tiers, tasks);
      }
      first[groups] = tasks.size();
      for (int64_t g = 0; g < groups; g++) tasks.push_back({(int32_t)g, 0, 0});
      parts.reset(new Buffer<float>(tasks.size() * size));
    }
#pragma omp barrier
    Queries queries(a);
    Codes codes(a, queries);
    Exact exact(a, queries);
    // Some at a time: those of a head share its transform.
    const int64_t share = std::max<int64_t>(1, tasks.size() / (4 * a.threads));
#pragma omp for schedule(dynamic, share)
    for (int64_t n = 0; n < (int64_t)tasks.size(); n++) {
      const Task& task = tasks[n];
      float* part = *parts + n * size;
      if (task.first == task.last)
        exact(task.group, part);
      else
        codes(task.group, &runs[task.group][task.first], task.last - task.first, part);
    }
    Transform values(a.dim);
#pragma omp for schedule(static)
    for (int64_t g = 0; g < groups; g++)
      merge(a, g, *parts + first[g] * size, first[g + 1] - first[g],
            *parts + (first[groups] + g) * size, values);
  }
}
