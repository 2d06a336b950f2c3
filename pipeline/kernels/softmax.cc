// y = softmax(x + b) along the last axis, and its gradient dx = y (dy - sum of dy y).
//
// x is (B, K, N, M), b is (B, M), the same for all rows of an image. MindSpore's own addition of b, and the subtraction
// in the gradient of its softmax, keep a list of source indices, 16 bytes a number, for as long as a graph lives.
#include <limits>

#include "exponential.h"
#include "pool.h"

namespace {
// The threads share the work by image and head, `rows` rows of x each.
struct Sizes {
  int64_t tables, rows, length, heads;

  explicit Sizes(const int64_t *x) : tables(x[0] * x[1]), rows(x[2]), length(x[3]), heads(x[1]) {}
};

void forward(void **data, int64_t **shapes) {
  const Sizes sizes(shapes[0]);
  const float *x = static_cast<float *>(data[0]), *b = static_cast<float *>(data[1]);
  float *y = static_cast<float *>(data[2]);
  const int64_t length = sizes.length;
  Pool::only().parallel_for(sizes.tables, [=](int table, int) {
    const float *bias = b + table / sizes.heads * length;
    for (int64_t row = table * sizes.rows; row < (table + 1) * sizes.rows; row++) {
      const float *in = x + row * length;
      float *out = y + row * length, largest = -std::numeric_limits<float>::infinity(), sum = 0;
#pragma omp simd reduction(max : largest)
      for (int64_t i = 0; i < length; i++) {
        out[i] = in[i] + bias[i];
        largest = out[i] > largest ? out[i] : largest;
      }
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < length; i++) {
        const float u = out[i] - largest;
        out[i] = u < -87.0f ? 0.0f : exponential(u);  // no denormal numbers, which are slow
        sum += out[i];
      }
      const float rate = 1.0f / sum;
#pragma omp simd
      for (int64_t i = 0; i < length; i++) out[i] *= rate;
    }
  });
}

void backward(void **data, int64_t **shapes) {
  const Sizes sizes(shapes[0]);
  const float *dy = static_cast<float *>(data[0]), *y = static_cast<float *>(data[1]);
  float *dx = static_cast<float *>(data[2]);
  const int64_t length = sizes.length;
  Pool::only().parallel_for(sizes.tables, [=](int table, int) {
    for (int64_t start = table * sizes.rows * length; start < (table + 1) * sizes.rows * length; start += length) {
      float sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = start; i < start + length; i++) sum += dy[i] * y[i];
#pragma omp simd
      for (int64_t i = start; i < start + length; i++) dx[i] = y[i] * (dy[i] - sum);
    }
  });
}
}  // namespace

// The entry points for MindSpore: data and shapes of inputs and outputs, (x, b) -> y and (dy, y) -> dx.
extern "C" {
int softmax(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<forward>(data, shapes);
}
int softmax_gradient(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run_exclusively<backward>(data, shapes);
}
}
