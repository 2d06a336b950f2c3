// y = f(a (x - mean) / sqrt(variance + EPSILON) + b) by groups of channels, f the identity or SiLU; and its gradient.
//
// x is (B, C, H, W), a and b are (B, G, C / G): factors per image, so that they include the scale and shift by an
// embedding. A group is read again while it is in the cache; sums are kept in double precision.
#include <cmath>

#include "exponential.h"
#include "pool.h"

namespace {
constexpr int64_t BLOCK = 1024;  // values that are summed in single precision

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

struct Moments {
  float mean, rate;
};

Moments moments(const float *x, int64_t size) {
  double total = 0, squares = 0;
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; i++) sum += x[i];
    total += sum;
  }
  const float mean = static_cast<float>(total / size);
  for (int64_t start = 0; start < size; start += BLOCK) {
    const int64_t stop = start + BLOCK < size ? start + BLOCK : size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = start; i < stop; i++) sum += (x[i] - mean) * (x[i] - mean);
    squares += sum;
  }
  return {mean, static_cast<float>(1.0 / std::sqrt(squares / size + EPSILON))};
}

struct Sizes {
  int64_t groups, channels, pixels;  // of the batch, of a group, of a channel

  Sizes(const int64_t *x, const int64_t *a) : groups(a[0] * a[1]), channels(a[2]), pixels(x[2] * x[3]) {}
};

template <bool silu>
void forward(void **data, int64_t **shapes) {
  const Sizes sizes(shapes[0], shapes[1]);
  const float *x = static_cast<float *>(data[0]), *a = static_cast<float *>(data[1]), *b = static_cast<float *>(data[2]);
  float *y = static_cast<float *>(data[3]);
  Pool::only().parallel_for(sizes.groups, [=](int group, int) {
    const int64_t size = sizes.channels * sizes.pixels, first = group * size;
    const Moments stats = moments(x + first, size);
    for (int64_t c = 0; c < sizes.channels; c++) {
      const int64_t column = group * sizes.channels + c, start = first + c * sizes.pixels;
      const float factor = a[column] * stats.rate, offset = b[column] - stats.mean * factor;
#pragma omp simd
      for (int64_t i = start; i < start + sizes.pixels; i++) {
        const float u = x[i] * factor + offset;
        y[i] = silu ? u * sigmoid(u) : u;
      }
    }
  });
}

template <bool silu>
void backward(void **data, int64_t **shapes) {
  const Sizes sizes(shapes[1], shapes[2]);
  const float *dy = static_cast<float *>(data[0]), *x = static_cast<float *>(data[1]);
  const float *a = static_cast<float *>(data[2]), *b = static_cast<float *>(data[3]);
  float *dx = static_cast<float *>(data[4]), *da = static_cast<float *>(data[5]), *db = static_cast<float *>(data[6]);
  Pool::only().parallel_for(sizes.groups, [=](int group, int) {
    const int64_t size = sizes.channels * sizes.pixels, first = group * size;
    const Moments stats = moments(x + first, size);
    double sum_z = 0, sum = 0;  // sums of a du z with z = (x - mean) rate, and of a du
    for (int64_t c = 0; c < sizes.channels; c++) {
      const int64_t column = group * sizes.channels + c, start = first + c * sizes.pixels;
      double column_z = 0, column_sum = 0;
      for (int64_t from = start; from < start + sizes.pixels; from += BLOCK) {
        const int64_t stop = from + BLOCK < start + sizes.pixels ? from + BLOCK : start + sizes.pixels;
        float block_z = 0, block_sum = 0;
#pragma omp simd reduction(+ : block_z, block_sum)
        for (int64_t i = from; i < stop; i++) {
          const float z = (x[i] - stats.mean) * stats.rate;
          float du = dy[i];
          if (silu) {
            const float u = z * a[column] + b[column], s = sigmoid(u);
            du *= s * (1.0f + u * (1.0f - s));
          }
          dx[i] = du;
          block_z += du * z;
          block_sum += du;
        }
        column_z += block_z, column_sum += block_sum;
      }
      da[column] = static_cast<float>(column_z), db[column] = static_cast<float>(column_sum);
      sum_z += a[column] * column_z, sum += a[column] * column_sum;
    }
    const float slope = static_cast<float>(sum_z / size) * stats.rate, mean = static_cast<float>(sum / size);
    for (int64_t c = 0; c < sizes.channels; c++) {
      const int64_t column = group * sizes.channels + c, start = first + c * sizes.pixels;
#pragma omp simd
      for (int64_t i = start; i < start + sizes.pixels; i++)
        dx[i] = stats.rate * (dx[i] * a[column] - mean - (x[i] - stats.mean) * slope);
    }
  });
}
}  // namespace

// The entry points for MindSpore: data and shapes of inputs and outputs,
// (x, a, b) -> y and (dy, x, a, b) -> dx, da, db.
extern "C" {
int normalize(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<forward<false>>(data, shapes);
}
int normalize_silu(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<forward<true>>(data, shapes);
}
int normalize_gradient(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<backward<false>>(data, shapes);
}
int normalize_silu_gradient(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<backward<true>>(data, shapes);
}
}
