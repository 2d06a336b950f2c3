// Of each row of x the number at a place among its ordered ones, between two of them: the quantile.
//
// x is (B, N); at is (3): the place is 4096 at[0] + at[1] + at[2], whole numbers and a rest; y is (B, 1). A row with a
// NaN answers NaN. MindSpore has only a sort of all larger numbers.
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
  const float rest = at[2];
  Pool::only().parallel_for(static_cast<int>(rows), [=](int row, int) {
    std::vector<float> numbers(x + row * length, x + (row + 1) * length);
    if (std::any_of(numbers.begin(), numbers.end(), [](float n) { return std::isnan(n); })) {
      y[row] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const auto place = numbers.begin() + below;
    std::nth_element(numbers.begin(), place, numbers.end());
    const bool between = rest > 0 && place + 1 < numbers.end();
    y[row] = between ? *place + rest * (*std::min_element(place + 1, numbers.end()) - *place) : *place;
  });
}
}  // namespace

// What MindSpore calls: data and shapes of inputs and outputs.
extern "C" int quantile(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return alone<quantiles>(data, shapes);
}
