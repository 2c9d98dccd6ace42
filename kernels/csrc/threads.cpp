// Distributes the rows of a call to threads.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

// The threads are those of torch's own OpenMP team, whose function is found by its name in the
// process. After the network's last layer they are still awake, and a second team would compete with
// them for the cores. In a forked child, libgomp hangs. So a forked child starts plain threads, as
// does a process whose torch has no OpenMP.

namespace {

std::atomic<bool> is_forked_child{false};

#if !defined(_WIN32)
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel openmp_team() {
  static const auto found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return is_forked_child.load(std::memory_order_relaxed) ? nullptr : found;
}

[[gnu::constructor]] void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { is_forked_child.store(true); });
}
#endif

struct Work {
  const Call& call;
  RowKernel kernel;
  WorkQueue queue;

  void operator()() { kernel(call, queue); }
};

void run(Work& work, int64_t threads) {
#if !defined(_WIN32)
  if (const auto parallel = openmp_team())
    return parallel([](void* work) { (*static_cast<Work*>(work))(); }, &work, threads, 0);
#endif
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < threads; ++i) others.emplace_back(std::ref(work));
  } catch (const std::system_error&) {
    // The system cannot start more threads. The started threads do the work.
  }
  work();
  for (auto& thread : others) thread.join();
}

// There are 32 blocks per thread, so that the other threads do not wait long for an interrupted one. A
// block covers whole cache lines of the statistics (16 rows of float32). If two threads wrote to the
// same line, it would move between their caches with every row.
int64_t rows_per_block(const Call& call, int64_t threads) {
  if (threads == 1) return std::max<int64_t>(call.rows, 1);
  const int64_t rows = call.rows / (32 * threads);
  if (rows >= 16) return rows / 16 * 16;
  return call.classes < 4096 ? 16 : std::max<int64_t>(rows, 1);
}

}  // namespace

void run_on_threads(const Call& call, RowKernel kernel) {
  constexpr int64_t kMinElements = 8192;  // of one network; for fewer, waking a thread costs more than it saves
  const bool small = call.rows * call.classes < kMinElements || call.rows < 2;
  const int64_t threads = small ? 1 : std::max<int64_t>(call.threads, 1);
  const int64_t block_rows = rows_per_block(call, threads);
  const int64_t blocks = (call.rows + block_rows - 1) / block_rows;
  // The rows of a thread are contiguous, so that it prefetches its own rows.
  std::vector<WorkQueue::Range> ranges(threads);
  const auto begin_of = [&](int64_t n) { return std::min(blocks * n / threads * block_rows, call.rows); };
  for (int64_t i = 0; i < threads; ++i) ranges[i] = {begin_of(i), begin_of(i + 1)};
  Work work{call, kernel, {ranges.data(), threads, block_rows, 0}};
  if (threads == 1) return work();
  run(work, threads);
}
