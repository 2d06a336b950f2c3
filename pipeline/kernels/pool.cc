#include "pool.h"

#include <sched.h>
#include <unistd.h>

#include <system_error>
#include <thread>

thread_local bool Pool::inside = false;

Pool &Pool::only() {
  static Pool *pool = new Pool;  // never deleted: its threads outlive main
  return *pool;
}

Pool::Pool() {
  cpu_set_t cores;  // of the main thread, as MindSpore may bind its other threads to cores
  const int num_cores = sched_getaffinity(getpid(), sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
  try {
    for (; threads < num_cores; threads++)
      std::thread([this, cores] {
        sched_setaffinity(0, sizeof cores, &cores);
        for (std::unique_lock<std::mutex> lock(mutex);;) {
          started.wait(lock, [this] { return next < total; });
          help(lock);
        }
      }).detach();
  } catch (const std::system_error &) {  // no more threads can be started: use those that were
  }
}

void Pool::parallel_for(int n, const std::function<void(int, int)> &work) {
  if (n <= 1 || inside || threads == 1) {
    for (int i = 0; i < n; i++) work(i, n);
    return;
  }
  std::unique_lock<std::mutex> lock(mutex);
  task = &work, total = left = n, next = 0;
  started.notify_all();
  help(lock);
  finished.wait(lock, [this] { return left == 0; });
}

void Pool::help(std::unique_lock<std::mutex> &lock) {
  inside = true;
  while (next < total) {
    const int i = next++, n = total;
    lock.unlock();
    (*task)(i, n);
    lock.lock();
    if (--left == 0) finished.notify_one();
  }
  inside = false;
}
