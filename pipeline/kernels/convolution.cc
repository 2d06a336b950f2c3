// Convolution by the oneDNN that MindSpore brings, which chooses the layout in which it computes.
//
// MindSpore's own kernel gives it pictures as they lie in memory, (B, C, H, W): for those oneDNN has im2col alone. Here
// it says which blocks of channels it wants, and pictures and weights are brought into them and back. oneDNN's headers
// do not come with MindSpore: what is used of the interface of the version that does is declared below and in pool.h.
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
// Names of operands, each with the query for the layout that is wanted of it.
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
  handle made;
  check(dnnl_memory_create(&made, desc, engine, nullptr));
  return made;
}

handle primitive(handle desc) {
  handle made;
  check(dnnl_primitive_create(&made, desc));
  return made;
}

struct Operand {
  int name;
  bool written;
  handle given, wanted, reorder;  // memory as MindSpore has it, as oneDNN wants it, the way between; null if alike
  size_t bytes;                   // of `wanted`
};

// A convolution, or a gradient of one, of certain shapes.
struct Plan {
  handle run;
  std::vector<Operand> operands;

  void add(handle desc, Name name, int ndims, const int64_t *shape, bool written = false) {
    handle given = plain(ndims, shape), wanted = name.query ? dnnl_primitive_desc_query_md(desc, name.query, 0) : given;
    Operand operand{name.argument, written, memory(given), nullptr, nullptr, 0};
    if (!dnnl_memory_desc_equal(given, wanted)) {
      operand.bytes = (dnnl_memory_desc_get_size(wanted) + 63) / 64 * 64;
      operand.wanted = memory(wanted);
      handle from = written ? wanted : given, to = written ? given : wanted, reorder;
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
      check(dnnl_memory_set_data_handle(operand.given, *data++));
      if (operand.reorder) {
        check(dnnl_memory_set_data_handle(operand.wanted, place));
        place += operand.bytes;
        if (!operand.written) convert(operand.reorder, operand.given, operand.wanted);
      }
      arguments.push_back({operand.name, operand.reorder ? operand.wanted : operand.given});
    }
    check(dnnl_primitive_execute(run, stream, arguments.size(), arguments.data()));
    for (const Operand &operand : operands)
      if (operand.reorder && operand.written) convert(operand.reorder, operand.wanted, operand.given);
    check(dnnl_stream_wait(stream));
  }

  static void convert(handle reorder, handle from, handle to) {
    const dnnl_argument both[] = {{SRC.argument, from}, {DST.argument, to}};
    check(dnnl_primitive_execute(reorder, stream, 2, both));
  }

  // Memory that the next call uses again: pages that are new each time cost as much as a convolution.
  static char *room(size_t bytes) {
    static char *found = nullptr;
    static size_t size = 0;
    if (bytes > size) {
      std::free(found);
      size = 0;
      found = static_cast<char *>(std::aligned_alloc(64, bytes));
      if (!found) throw OUT_OF_MEMORY;
      size = bytes;
    }
    return found;
  }
};

enum Kind { FORWARD, INPUT, WEIGHT };

// x, w, y: shapes of picture, weights and answer. The padding is what keeps the picture's size.
Plan plan(Kind kind, const int64_t *x, const int64_t *w, const int64_t *y) {
  const int longer = x[3] > x[2] ? 3 : 2;
  const int64_t stride = (x[longer] + y[longer] - 1) / y[longer], left[] = {w[2] / 2, w[3] / 2};
  const int64_t strides[] = {stride, stride}, dilates[] = {0, 0};
  const int64_t right[] = {(y[2] - 1) * stride + w[2] - x[2] - left[0], (y[3] - 1) * stride + w[3] - x[3] - left[1]};
  handle bias = plain(1, w), forward, desc;
  check(dnnl_convolution_forward_primitive_desc_create(&forward, engine, TRAINING, DIRECT, any(x), any(w), bias, any(y),
                                                       strides, dilates, left, right, nullptr));
  Plan made;
  if (kind == FORWARD) {
    desc = forward;
    made.add(desc, SRC, 4, x);
    made.add(desc, WEIGHTS, 4, w);
    made.add(desc, BIAS, 1, w);
    made.add(desc, DST, 4, y, true);
  } else if (kind == INPUT) {
    check(dnnl_convolution_backward_data_primitive_desc_create(&desc, engine, DIRECT, any(x), any(w), any(y), strides,
                                                               dilates, left, right, forward, nullptr));
    made.add(desc, DIFF_DST, 4, y);
    made.add(desc, WEIGHTS, 4, w);
    made.add(desc, DIFF_SRC, 4, x, true);
  } else {
    check(dnnl_convolution_backward_weights_primitive_desc_create(&desc, engine, DIRECT, any(x), any(w), bias, any(y),
                                                                  strides, dilates, left, right, forward, nullptr));
    made.add(desc, DIFF_DST, 4, y);
    made.add(desc, SRC, 4, x);
    made.add(desc, DIFF_WEIGHTS, 4, w, true);
    made.add(desc, DIFF_BIAS, 1, w, true);
  }
  made.run = primitive(desc);
  return made;
}

// oneDNN's status, which MindSpore tells if it is not 0.
int run(Kind kind, std::vector<void *> data, const int64_t *x, const int64_t *w, const int64_t *y) {
  try {
    Pool &pool = Pool::only();
    std::lock_guard<std::mutex> guard(pool.user);
    check(dnnl_threadpool_interop_set_max_concurrency(pool.get_num_threads()));  // of this thread, for plans
    if (!stream) {
      check(dnnl_engine_create(&engine, CPU, 0));
      check(dnnl_threadpool_interop_stream_create(&stream, engine, &pool));
    }
    static std::map<std::array<int64_t, 13>, Plan> plans;
    std::array<int64_t, 13> key{kind};
    for (int i = 0; i < 4; i++) key[1 + i] = x[i], key[5 + i] = w[i], key[9 + i] = y[i];
    auto found = plans.find(key);
    if (found == plans.end()) found = plans.emplace(key, plan(kind, x, w, y)).first;
    found->second(data.data());
    return SUCCESS;
  } catch (int status) {
    return status;
  } catch (...) {
    return OUT_OF_MEMORY;
  }
}
}  // namespace

// What MindSpore calls: data and shapes of inputs and outputs.
extern "C" {
// (x, w, b) -> y
int convolve(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(FORWARD, {data[0], data[1], data[2], data[3]}, shapes[0], shapes[1], shapes[3]);
}
// (dy, x, w) -> dx; of x the shape alone
int convolve_input(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(INPUT, {data[0], data[2], data[3]}, shapes[1], shapes[2], shapes[0]);
}
// (dy, x, w) -> dw, db; of w the shape alone
int convolve_weight(int, void **data, int *, int64_t **shapes, const char **, void *, void *) {
  return run(WEIGHT, {data[0], data[1], data[3], data[4]}, shapes[1], shapes[2], shapes[0]);
}
}
