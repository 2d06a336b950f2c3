// Convolution by the oneDNN that MindSpore brings, in the layout that oneDNN chooses.
//
// MindSpore's own kernel passes images as they are in memory, (B, C, H, W), a layout for which oneDNN has only im2col.
// Here oneDNN chooses blocks of channels, and images and weights are reordered into them and back. MindSpore does not
// include oneDNN's headers: the parts of its interface that are used are declared below and in pool.h, as they are in
// the version that MindSpore brings.
#include <array>
#include <cstdlib>
#include <map>
#include <vector>

#include "pool.h"

extern "C" {
typedef struct dnnl_object *handle;
struct dnnl_argument {
  int name;
  handle memory;
};
int dnnl_engine_create(handle *, int kind, size_t index);
int dnnl_threadpool_interop_stream_create(handle *, handle engine, void *pool);
int dnnl_threadpool_interop_set_max_concurrency(int threads);
int dnnl_stream_wait(handle);
int dnnl_memory_desc_create_with_strides(handle *, int ndims, const int64_t *dims, int type, const int64_t *strides);
int dnnl_memory_desc_create_with_tag(handle *, int ndims, const int64_t *dims, int type, int tag);
int dnnl_memory_desc_equal(handle, handle);
size_t dnnl_memory_desc_get_size(handle);
int dnnl_memory_create(handle *, handle desc, handle engine, void *data);
int dnnl_memory_set_data_handle(handle, void *data);
int dnnl_convolution_forward_primitive_desc_create(handle *, handle engine, int prop, int algorithm, handle src,
                                                   handle weights, handle bias, handle dst, const int64_t *strides,
                                                   const int64_t *dilates, const int64_t *left, const int64_t *right,
                                                   handle attr);
int dnnl_convolution_backward_data_primitive_desc_create(handle *, handle engine, int algorithm, handle diff_src,
                                                         handle weights, handle diff_dst, const int64_t *strides,
                                                         const int64_t *dilates, const int64_t *left,
                                                         const int64_t *right, handle forward, handle attr);
int dnnl_convolution_backward_weights_primitive_desc_create(handle *, handle engine, int algorithm, handle src,
                                                            handle diff_weights, handle diff_bias, handle diff_dst,
                                                            const int64_t *strides, const int64_t *dilates,
                                                            const int64_t *left, const int64_t *right, handle forward,
                                                            handle attr);
int dnnl_reorder_primitive_desc_create(handle *, handle from, handle from_engine, handle to, handle to_engine, handle);
handle dnnl_primitive_desc_query_md(handle, int what, int index);
int dnnl_primitive_create(handle *, handle desc);
int dnnl_primitive_execute(handle, handle stream, int number, const dnnl_argument *);
}

namespace {
enum { SUCCESS = 0, OUT_OF_MEMORY = 1, FLOAT32 = 3, ANY_LAYOUT = 1, CPU = 1, TRAINING = 64, DIRECT = 1 };
// Names of operands, each with the query for the layout that oneDNN prefers.
struct Name {
  int argument, query;
};
constexpr Name SRC{1, 129}, DST{17, 133}, WEIGHTS{33, 131}, BIAS{41, 0};
constexpr Name DIFF_SRC{129, 130}, DIFF_DST{145, 134}, DIFF_WEIGHTS{161, 132}, DIFF_BIAS{169, 0};

handle engine, stream;

void check(int status) {
  if (status != SUCCESS) throw status;
}

handle plain(int ndims, const int64_t *shape) {
  int64_t strides[4], step = 1;
  for (int i = ndims; i--; step *= shape[i]) strides[i] = step;
  handle desc;
  check(dnnl_memory_desc_create_with_strides(&desc, ndims, shape, FLOAT32, strides));
  return desc;
}

handle any(const int64_t *shape) {
  handle desc;
  check(dnnl_memory_desc_create_with_tag(&desc, 4, shape, FLOAT32, ANY_LAYOUT));
  return desc;
}

handle memory(handle desc) {
  handle created;
  check(dnnl_memory_create(&created, desc, engine, nullptr));
  return created;
}

handle primitive(handle desc) {
  handle created;
  check(dnnl_primitive_create(&created, desc));
  return created;
}

struct Operand {
  int name;
  bool written;
  handle plain, blocked, reorder;  // memory in MindSpore's layout, in oneDNN's, and the reorder; null if alike
  size_t bytes;                    // of `blocked`
};

// A convolution, or a gradient of one, of certain shapes.
struct Plan {
  handle run;
  std::vector<Operand> operands;

  void add(handle desc, Name name, int ndims, const int64_t *shape, bool written = false) {
    handle layout = plain(ndims, shape);
    handle preferred = name.query ? dnnl_primitive_desc_query_md(desc, name.query, 0) : layout;
    Operand operand{name.argument, written, memory(layout), nullptr, nullptr, 0};
    if (!dnnl_memory_desc_equal(layout, preferred)) {
      operand.bytes = (dnnl_memory_desc_get_size(preferred) + 63) / 64 * 64;
      operand.blocked = memory(preferred);
      handle from = written ? preferred : layout, to = written ? layout : preferred, reorder;
      check(dnnl_reorder_primitive_desc_create(&reorder, from, engine, to, engine, nullptr));
      operand.reorder = primitive(reorder);
    }
    operands.push_back(operand);
  }

  void operator()(void *const *data) const {
    size_t bytes = 0;
    for (const Operand &operand : operands) bytes += operand.bytes;
    char *place = room(bytes);
    std::vector<dnnl_argument> arguments;
    for (const Operand &operand : operands) {
      check(dnnl_memory_set_data_handle(operand.plain, *data++));
      if (operand.reorder) {
        check(dnnl_memory_set_data_handle(operand.blocked, place));
        place += operand.bytes;
        if (!operand.written) convert(operand.reorder, operand.plain, operand.blocked);
      }
      arguments.push_back({operand.name, operand.reorder ? operand.blocked : operand.plain});
    }
    check(dnnl_primitive_execute(run, stream, arguments.size(), arguments.data()));
    for (const Operand &operand : operands)
      if (operand.reorder && operand.written) convert(operand.reorder, operand.blocked, operand.plain);
    check(dnnl_stream_wait(stream));
  }

  static void convert(handle reorder, handle from, handle to) {
    const dnnl_argument both[] = {{SRC.argument, from}, {DST.argument, to}};
    check(dnnl_primitive_execute(reorder, stream, 2, both));
  }

  // Memory that the next call reuses: new pages for each call would cost as much as a convolution.
  static char *room(size_t bytes) {
    static char *buffer = nullptr;
    static size_t size = 0;
    if (bytes > size) {
      std::free(buffer);
      size = 0;
      buffer = static_cast<char *>(std::aligned_alloc(64, bytes));
      if (!buffer) throw OUT_OF_MEMORY;
      size = bytes;
    }
    return buffer;
  }
};

enum Kind { FORWARD, INPUT, WEIGHT };

// x, w, y: shapes of image, weights and output. The padding keeps the image's size.
Plan plan(Kind kind, const int64_t *x, const int64_t *w, const int64_t *y) {
  const int longer = x[3] > x[2] ? 3 : 2;
  const int64_t stride = (x[longer] + y[longer] - 1) / y[longer], left[] = {w[2] / 2, w[3] / 2};
  const int64_t strides[] = {stride, stride}, dilates[] = {0, 0};
  const int64_t right[] = {(y[2] - 1) * stride + w[2] - x[2] - left[0], (y[3] - 1) * stride + w[3] - x[3] - left[1]};
  handle bias = plain(1, w), forward, desc;
  check(dnnl_convolution_forward_primitive_desc_create(&forward, engine, TRAINING, DIRECT, any(x), any(w), bias, any(y),
                                                       strides, dilates, left, right, nullptr));
  Plan result;
  if (kind == FORWARD) {
    desc = forward;
    result.add(desc, SRC, 4, x);
    result.add(desc, WEIGHTS, 4, w);
    result.add(desc, BIAS, 1, w);
    result.add(desc, DST, 4, y, true);
  } else if (kind == INPUT) {
    check(dnnl_convolution_backward_data_primitive_desc_create(&desc, engine, DIRECT, any(x), any(w), any(y), strides,
                                                               dilates, left, right, forward, nullptr));
    result.add(desc, DIFF_DST, 4, y);
    result.add(desc, WEIGHTS, 4, w);
    result.add(desc, DIFF_SRC, 4, x, true);
  } else {
    check(dnnl_convolution_backward_weights_primitive_desc_create(&desc, engine, DIRECT, any(x), any(w), bias, any(y),
                                                                  strides, dilates, left, right, forward, nullptr));
    result.add(desc, DIFF_DST, 4, y);
    result.add(desc, SRC, 4, x);
    result.add(desc, DIFF_WEIGHTS, 4, w, true);
    result.add(desc, DIFF_BIAS, 1, w, true);
  }
  result.run = primitive(desc);
  return result;
}

// Returns oneDNN's status, which MindSpore reports if it is not 0.
int run(Kind kind, std::vector<void *> data, const int64_t *x, const int64_t *w, const int64_t *y) {
  try {
    Pool &pool = Pool::only();
    std::lock_guard<std::mutex> guard(pool.user);
    check(dnnl_threadpool_interop_set_max_concurrency(pool.get_num_threads()));  // per thread, for new plans
    if (!stream) {
      check(dnnl_engine_create(&engine, CPU, 0));
      check(dnnl_threadpool_interop_stream_create(&stream, engine, &pool));
    }
    static std::map<std::array<int64_t, 13>, Plan> plans;
    std::array<int64_t, 13> key{kind};
    for (int i = 0; i < 4; i++) key[1 + i] = x[i], key[5 + i] = w[i], key[9 + i] = y[i];
    auto entry = plans.find(key);
    if (entry == plans.end()) entry = plans.emplace(key, plan(kind, x, w, y)).first;
    entry->second(data.data());
    return SUCCESS;
  } catch (int status) {
    return status;
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}
}  // namespace

// The entry points for MindSpore: data and shapes of inputs and outputs.
extern "C" {
// (x, w, b) -> y
int convolve(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(FORWARD, {data[0], data[1], data[2], data[3]}, shapes[0], shapes[1], shapes[3]);
}
// (dy, x, w) -> dx; only the shape of x is used
int convolve_input(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(INPUT, {data[0], data[2], data[3]}, shapes[1], shapes[2], shapes[0]);
}
// (dy, x, w) -> dw, db; only the shape of w is used
int convolve_weight(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(WEIGHT, {data[0], data[1], data[3], data[4]}, shapes[1], shapes[2], shapes[0]);
}
}
