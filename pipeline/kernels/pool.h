// The thread pool that all kernels share, with as many threads as the process may use cores.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>

// The virtual functions are those of oneDNN's `threadpool_iface`, in the order of their declaration.
class Pool {
 public:
  virtual int get_num_threads() const { return threads; }
  virtual bool get_in_parallel() const { return inside; }
  // work(i, n) for every i of n, in any order; the caller's thread takes part.
  virtual void parallel_for(int n, const std::function<void(int, int)> &work);
  virtual uint64_t get_flags() const { return 0; }
  virtual void wait() {}
  virtual ~Pool() = default;

  static Pool &only();
  std::mutex user;  // held by the kernel that is running

 private:
  Pool();
  void help(std::unique_lock<std::mutex> &lock);

  static thread_local bool inside;
  int threads = 1;
  std::mutex mutex;  // guards the members below
  std::condition_variable started, finished;
  const std::function<void(int, int)> *task = nullptr;
  int total = 0, next = 0, left = 0;
};

// Runs a kernel exclusively. Returns what MindSpore expects: 0, or 1 for an error.
template <void kernel(void **, int64_t **)>
int run_exclusively(void **data, int64_t **shapes) {
  try {
    std::lock_guard<std::mutex> guard(Pool::only().user);
    kernel(data, shapes);
    return 0;
  } catch (...) {
    return 1;
  }
}
