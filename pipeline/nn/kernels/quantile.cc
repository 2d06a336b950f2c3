// Of each row of x the number at a place among its ordered ones, between two of them: the quantile.
//
// x is (B, N); at is (2), the place's whole part and the rest; y is (B, 1). A row with a NaN answers NaN. MindSpore's own
// way is a sort of all that is larger, of which a picture has many.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "pool.h"

namespace {
void quantiles(void **data, int64_t **shapes) {
  const float *x = static_cast<float *>(data[0]), *at = static_cast<float *>(data[1]);
  float *y = static_cast<float *>(data[2]);
  const int64_t rows = shapes[0][0], length = shapes[0][1], below = static_cast<int64_t>(at[0]);
  const float rest = at[1];
  Pool::only().parallel_for(static_cast<int>(rows), [=](int row, int) {
    std::vector<float> numbers(x + row * length, x + (row + 1) * length);
    if (std::any_of(numbers.begin(), numbers.end(), [](float n) { return std::isnan(n); })) {
      y[row] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const auto place = numbers.begin() + below;
    std::nth_element(numbers.begin(), place, numbers.end());
    const float upper = place + 1 < numbers.end() ? *std::min_element(place + 1, numbers.end()) : *place;
    y[row] = *place + rest * (upper - *place);
  });
}
}  // namespace

// What MindSpore calls: data and shapes of inputs and outputs.
extern "C" int quantile(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return alone<quantiles>(data, shapes);
}
