// The C interface: picks the instruction set, shares the rows among threads, reduces in a fixed
// order. Nothing here knows of torch or Python.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <system_error>
#include <thread>
#include <vector>

#include "kernel.h"

#if !defined(_WIN32)
#include <dlfcn.h>
#include <pthread.h>
#endif

#ifndef BDKD_SOURCES
#define BDKD_SOURCES "unknown"
#endif

namespace portable { extern const RowKernels kernels; }
#if defined(BDKD_X86)
namespace avx2 { extern const RowKernels kernels; }
namespace avx512 { extern const RowKernels kernels; }
namespace avx512bf16 { extern const RowKernels kernels; }
#endif

namespace {

struct InstructionSet {
  const char* name;
  const RowKernels& kernels;
  bool here;
};

const std::vector<InstructionSet>& instruction_sets() {  // best first
  static const std::vector<InstructionSet> sets = {
#if defined(BDKD_X86)
      {"avx512bf16", avx512bf16::kernels,
       __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
      {"avx512", avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")},
      {"avx2", avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"portable", portable::kernels, true},
  };
  return sets;
}

const InstructionSet* best() {
  for (auto& set : instruction_sets())
    if (set.here) return &set;
  return nullptr;
}

std::atomic<const InstructionSet*> chosen{best()};

// ---- threads -----------------------------------------------------------------------------------
//
// torch's own OpenMP team is used, found by name in the process: its threads are awake after the
// network's last layer, and a second team would fight them for the cores. A forked child must not
// touch that team (libgomp hangs there): it starts threads of its own, as does a process whose
// torch has no OpenMP.

std::atomic<bool> forked{false};

#if !defined(_WIN32)
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel team() {
  static const auto found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
  return forked.load(std::memory_order_relaxed) ? nullptr : found;
}

[[gnu::constructor]] void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked.store(true); });
}
#endif

struct Work {
  const Call& call;
  RunRows run;
  Shares shares;

  void operator()() { run(call, shares); }
};

void run_all(const Call& call, RunRows run, int threads) {
  constexpr int64_t kAlone = 8192;  // class pairs: what a thread that is awake gains below it, its waking costs
  if (threads < 1 || call.rows * call.classes < kAlone || call.rows < 2) threads = 1;
  // A thread's rows lie side by side, so that what it fetches ahead is its own; in thirty-two shares, so that
  // one that was interrupted is not waited for. A share is of whole lines of the statistics, 16 rows, or two
  // threads would take them from each other row by row.
  int64_t size = call.rows / (32 * threads);
  size = size >= 16 ? size / 16 * 16 : call.classes < 4096 ? 16 : size > 1 ? size : 1;
  if (threads == 1) size = std::max<int64_t>(call.rows, 1);
  const int64_t shares = (call.rows + size - 1) / size;
  std::vector<Shares::Range> ranges(threads);
  for (int64_t i = 0; i < threads; ++i) {
    const auto until = [&](int64_t n) { return std::min(shares * n / threads * size, call.rows); };
    ranges[i] = {until(i), until(i + 1)};
  }
  Work work{call, run, {ranges.data(), threads, size, 0}};
  if (threads == 1) return work();
#if !defined(_WIN32)
  if (auto parallel = team()) return parallel([](void* work) { (*static_cast<Work*>(work))(); }, &work, threads, 0);
#endif
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads; ++i) others.emplace_back(std::ref(work));
  } catch (const std::system_error&) {  // no more threads to be had: those there are do the work
  }
  work();
  for (auto& thread : others) thread.join();
}

double ordered_sum(const double* x, int64_t n) {
  double lanes[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) lanes[k] += x[i + k];
  for (; i < n; ++i) lanes[i % 8] += x[i];
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

template <class R>
void write_loss(const double* rows, const Call& call, void* loss) {
  if (call.options.none) {
    for (int64_t i = 0; i < call.rows; ++i) ((R*)loss)[i] = rows[i];
  } else {
    *(R*)loss = ordered_sum(rows, call.rows) * call.per_row;
  }
}

double weight_at(const void* weight, bool wide, int64_t i) {
  return !weight ? 1.0 : wide ? ((const double*)weight)[i] : ((const float*)weight)[i];
}

}  // namespace

EXPORT int64_t bdkd_run(const void* packed) {
  Arguments a;
  memcpy(&a, packed, offsetof(Arguments, check_labels) + sizeof a.check_labels);
  const Options* options = &a.options;
  const int64_t rows = a.rows, classes = a.classes;
  const bool wide = a.storage_s == kFloat64 || a.storage_t == kFloat64;
  const int64_t* labels = a.target_kind == kLabels ? (const int64_t*)a.target : nullptr;
  double counted = 0;
  if (labels && (a.check_labels || options->mean)) {
    const int64_t ignore = options->ignore_index;
    int64_t kept = 0, bad = 0;
    for (int64_t i = 0; i < rows; ++i) {
      kept += labels[i] != ignore;
      bad += (uint64_t)labels[i] >= (uint64_t)classes && labels[i] != ignore;
    }
    if (a.check_labels && bad) {
      int64_t i = 0;
      while ((uint64_t)labels[i] < (uint64_t)classes || labels[i] == ignore) ++i;
      return i;
    }
    counted = kept;
  } else {
    counted = rows;
  }
  if (a.weight && options->mean) {
    counted = 0;
    for (int64_t i = 0; i < rows; ++i)
      if (!labels || labels[i] != options->ignore_index) counted += weight_at(a.weight, wide, i);
  }

  Call call{};
  call.options = *options;
  call.rows = rows, call.classes = classes;
  call.student = {a.storage_s, a.s, a.stride_s, a.ds, a.stride_ds, a.upstream_s, a.scale_s};
  call.teacher = {a.storage_t, a.t, a.stride_t, a.dt, a.stride_dt, a.upstream_t, a.scale_t};
  call.target_kind = a.target_kind, call.target = a.target, call.weight = a.weight;
  call.per_row = options->mean && counted != 0 ? 1 / counted : 1;
  call.stats = a.stats;
  // Gradients too large for the caches that their reader could find them in go past them. That
  // takes whole vectors, of both networks alike.
  constexpr int64_t kStreamed = 4 << 20;
  int64_t bytes = 0;
  uint64_t apart = 0;
  const Logits* before = nullptr;
  for (const Logits* network : {&call.student, &call.teacher}) {
    if (!network->gradient) continue;
    const int64_t size = kStorageSize[network->storage];
    bytes += rows * classes * size;
    if (before)
      apart = ((uintptr_t)network->gradient - (uintptr_t)before->gradient |
               (network->gradient_stride - before->gradient_stride) * size) % 64;
    before = network;
  }
  call.streaming = bytes >= kStreamed && !apart;

  std::unique_ptr<double[]> losses;
  if (a.loss_s) {
    losses.reset(new double[2 * rows]);
    call.student_loss = losses.get(), call.teacher_loss = losses.get() + rows;
  }
  const RowKernels& kernels = chosen.load()->kernels;
  run_all(call, a.storage_s == a.storage_t ? kernels.of[a.storage_s] : wide ? kernels.mixed_wide : kernels.mixed,
          a.threads);
  if (a.loss_s) {
    auto write = wide ? write_loss<double> : write_loss<float>;
    write(call.student_loss, call, a.loss_s);
    write(call.teacher_loss, call, a.loss_t);
  }
  return -1;
}

EXPORT const char* bdkd_instruction_set(const char* name) {
  if (name) {
    for (auto& set : instruction_sets())
      if (!strcmp(set.name, name) && set.here) return chosen = &set, set.name;
    return nullptr;
  }
  return chosen.load()->name;
}

EXPORT const char* bdkd_sources() { return BDKD_SOURCES; }
