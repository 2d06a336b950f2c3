// The quantile of each row of x: the value at a position in ascending order, with linear interpolation.
//
// x is (B, N); at is (3): the position is 4096 at[0] + at[1] + at[2], two whole values and a fraction; y is (B, 1). A
// row with a NaN gives NaN. MindSpore can only sort all larger values.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"

namespace {
void quantiles(void **data, int64_t **shapes) {
  const float *x = static_cast<float *>(data[0]), *at = static_cast<float *>(data[1]);
  float *y = static_cast<float *>(data[2]);
  const int64_t rows = shapes[0][0], length = shapes[0][1];
  const int64_t below = std::min(4096 * static_cast<int64_t>(at[0]) + static_cast<int64_t>(at[1]), length - 1);
  const float fraction = at[2];
  Pool::only().parallel_for(static_cast<int>(rows), [=](int row, int) {
    std::vector<float> values(x + row * length, x + (row + 1) * length);
    if (std::any_of(values.begin(), values.end(), [](float value) { return std::isnan(value); })) {
      y[row] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const auto position = values.begin() + below;
    std::nth_element(values.begin(), position, values.end());
    const bool between = fraction > 0 && position + 1 < values.end();
    y[row] = between ? *position + fraction * (*std::min_element(position + 1, values.end()) - *position) : *position;
  });
}
}  // namespace

// The entry point for MindSpore: data and shapes of inputs and outputs.
extern "C" int quantile(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<quantiles>(data, shapes);
}
