// The C interface. It checks the labels, chooses the instruction set, and reduces the losses in a
// fixed order. It does not depend on torch or Python.
#include "kernel.h"

#include <atomic>
#include <cstring>
#include <memory>
#include <vector>

#include "threads.h"

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
  bool is_supported;
};

const std::vector<InstructionSet>& instruction_sets() {  // fastest first
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

const InstructionSet* fastest() {
  for (auto& set : instruction_sets())
    if (set.is_supported) return &set;
  return nullptr;
}

std::atomic<const InstructionSet*> chosen{fastest()};

bool computes_in_float64(const Arguments& a) {
  return a.student.storage == kFloat64 || a.teacher.storage == kFloat64;
}

// Returns the first row whose label is neither in [0, classes) nor ignored, or -1.
int64_t first_invalid_label(const Arguments& a) {
  const auto* labels = (const int64_t*)a.target;
  const auto is_invalid = [&](int64_t i) {
    return (uint64_t)labels[i] >= (uint64_t)a.classes && labels[i] != a.options.ignore_index;
  };
  int64_t invalid = 0;  // counted first, because a loop without an early exit can be vectorised
  for (int64_t i = 0; i < a.rows; ++i) invalid += is_invalid(i);
  if (!invalid) return -1;
  int64_t row = 0;
  while (!is_invalid(row)) ++row;
  return row;
}

// Returns the sum of the weights of all rows that are not ignored. The mean divides by this sum.
double total_weight(const Arguments& a) {
  const auto* labels = a.target_kind == kLabels ? (const int64_t*)a.target : nullptr;
  const auto is_counted = [&](int64_t i) { return !labels || labels[i] != a.options.ignore_index; };
  if (!a.weight) {
    int64_t counted = 0;
    for (int64_t i = 0; i < a.rows; ++i) counted += is_counted(i);
    return counted;
  }
  double total = 0;
  const bool is_float64 = computes_in_float64(a);
  for (int64_t i = 0; i < a.rows; ++i)
    if (is_counted(i)) total += is_float64 ? ((const double*)a.weight)[i] : ((const float*)a.weight)[i];
  return total;
}

// Non-temporal stores are faster for gradients that are too large to stay in the caches until they are
// read. They write whole cache lines. One loop writes both gradients, so the cache lines of both must
// begin at the same classes of a row.
bool use_nontemporal_stores(const Arguments& a) {
  constexpr int64_t kMinBytes = 4 << 20;
  constexpr uint64_t kLineBytes = 64;
  const Network &s = a.student, &t = a.teacher;
  int64_t bytes = 0;
  for (const Network* network : {&s, &t})
    if (network->gradient) bytes += a.rows * a.classes * kStorageBytes[network->storage];
  uint64_t difference = 0;
  if (s.gradient && t.gradient)
    difference = ((uintptr_t)t.gradient - (uintptr_t)s.gradient) |
                 (uint64_t)((t.gradient_stride - s.gradient_stride) * kStorageBytes[t.storage]);
  return bytes >= kMinBytes && difference % kLineBytes == 0;
}

RowKernel choose_kernel(const Arguments& a) {
  const RowKernels& kernels = chosen.load()->kernels;
  if (a.student.storage == a.teacher.storage) return kernels.by_storage[a.student.storage];
  return computes_in_float64(a) ? kernels.mixed_float64 : kernels.mixed;
}

// Adds eight partial sums in a fixed order, so that the number of threads does not change the result.
double ordered_sum(const double* x, int64_t n) {
  double partial[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int k = 0; k < 8; ++k) partial[k] += x[i + k];
  for (; i < n; ++i) partial[i % 8] += x[i];
  return ((partial[0] + partial[1]) + (partial[2] + partial[3])) +
         ((partial[4] + partial[5]) + (partial[6] + partial[7]));
}

template <class R>
void write_loss(const double* rows, const Call& call, void* loss) {
  if (call.options.reduction == kReductionNone)
    for (int64_t i = 0; i < call.rows; ++i) ((R*)loss)[i] = rows[i];
  else
    *(R*)loss = ordered_sum(rows, call.rows) * call.row_scale;
}

}  // namespace

EXPORT int64_t bdkd_run(const void* packed) {
  Call call{};
  Arguments& arguments = call;
  memcpy(&arguments, packed, sizeof arguments);
  if (call.check_labels && call.target_kind == kLabels)
    if (const int64_t row = first_invalid_label(call); row >= 0) return row;
  const double weight = call.options.reduction == kReductionMean ? total_weight(call) : 0;
  call.row_scale = weight != 0 ? 1 / weight : 1;
  call.nontemporal = use_nontemporal_stores(call);

  const bool has_losses = call.student.loss != nullptr;
  std::unique_ptr<double[]> row_losses;
  if (has_losses) {
    row_losses.reset(new double[2 * call.rows]);
    call.row_loss = {row_losses.get(), row_losses.get() + call.rows};
  }
  run_on_threads(call, choose_kernel(call));
  if (has_losses) {
    const auto write = computes_in_float64(call) ? write_loss<double> : write_loss<float>;
    write(call.row_loss.student, call, call.student.loss);
    write(call.row_loss.teacher, call, call.teacher.loss);
  }
  return -1;
}

EXPORT const char* bdkd_instruction_set(const char* name) {
  if (!name) return chosen.load()->name;
  for (auto& set : instruction_sets())
    if (set.is_supported && !strcmp(set.name, name)) return chosen = &set, set.name;
  return nullptr;
}

EXPORT const char* bdkd_sources() { return BDKD_SOURCES; }
