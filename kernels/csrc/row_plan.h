// The data that all rows of a call share, and the state of the rows in progress.
//
// For one row, each network has logits z and
//
//   x = z - max z      e = exp(x / temperature)      e1 = exp(x)
//
// and both share g = x_teacher - x_student. Sums of these over the classes give the losses
// (row_math.h). A linear function of e, e g and e1 gives the gradients (gradients.h).
#pragma once
#include <memory>

#include "call.h"
#include "simd_math.h"

namespace BDKD_ISA {
namespace {

constexpr double kLog2E = 1.44269504088896341;
constexpr bool kHas32Registers = BDKD_BYTES == 64;

constexpr int64_t kBlockVectors = 64;         // vectors summed in the compute type; float64 adds up the blocks
constexpr int64_t kChunkClasses = 1024;       // classes of a long row that stay cached from maxima to sums
constexpr int64_t kPrefetchBytes = 16 << 10;  // bytes of logits between the current and the prefetched row

// Number of rows whose logarithms, losses and coefficients are computed together, one per lane. With few
// classes, this arithmetic takes longer than the loops over the classes. The rows are independent.
constexpr int kGroupRows = 8;
constexpr int64_t kGroupBytes = 96 << 10;  // of a group's saved exponentials

// The version of a loop: a temperature or one of these constants. For temperatures of 1, 2, 4 and 8,
// exp(x) is a power of exp(x / temperature). Only kGeneral has run-time branches for rare cases, so that
// the other versions keep their sums in registers.
constexpr int kAnyTemperature = 0, kGeneral = -1;

// General loops limit x to at least kFloor / log2(e) (times the temperature for e). Then the smallest
// exponentials are 0, also for a class that is masked by -inf.
constexpr int kFloor = -4096;

// Calls f once for each network, with the .student and the .teacher of all arguments. Returns the
// results as a Pair.
template <class F, class... T>
INLINE auto both(F f, T&&... of) {
  using Result = decltype(f(of.student...));
  if constexpr (std::is_void_v<Result>) f(of.student...), f(of.teacher...);
  else return Pair<Result>{f(of.student...), f(of.teacher...)};
}

template <class T>
INLINE Pair<T*> operator+(Pair<T*> rows, int64_t classes) {
  return {rows.student + classes, rows.teacher + classes};
}

template <class R>
struct AlignedDelete {
  void operator()(R* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// Returns memory of this thread for at least `count` values. A later call with the same R reuses it.
template <class R>
R* scratch(int64_t count) {
  static thread_local std::unique_ptr<R[], AlignedDelete<R>> memory;
  static thread_local int64_t capacity = 0;
  if (count > capacity) {
    memory.reset();
    capacity = 0;
    memory.reset(new (std::align_val_t(64)) R[count]);
    capacity = count;
  }
  return memory.get();
}

// The plan for the rows of a call with storage type S. Each thread creates it once per call.
template <class S>
struct RowPlan {
  using R = std::conditional_t<std::is_same_v<S, double>, double, float>;  // compute type
  static constexpr int W = lanes<R>;
  using V = Vec<R, W>;

  const Call& call;
  const Options& options = call.options;
  const int64_t classes = call.classes;
  const int64_t padded = (classes + W - 1) / W * W;  // whole vectors

  const bool has_labels = call.target_kind == kLabels;
  const bool has_probabilities = call.target_kind == kProbabilities;
  const bool has_target = has_labels || has_probabilities;
  const Pair<bool> has_ce{options.student_ce != 0 && has_target, options.teacher_ce != 0 && has_target};
  const Pair<bool> has_kd{options.student_kd != 0, options.teacher_kd != 0};
  const bool any_kd = has_kd.student || has_kd.teacher;
  const bool smooths_labels = has_labels && options.label_smoothing != 0 && (has_ce.student || has_ce.teacher);
  const bool entropy_at_1 = any_kd && !options.soften_entropy;
  const bool teacher_forward = options.teacher_divergence == kTeacherDivergenceForward;

  const double temperature = any_kd ? options.temperature : 1.0;
  const R log2_scale = kLog2E / temperature;  // e = 2^(x log2_scale)
  const int version = temperature == 1 || temperature == 2 || temperature == 4 || temperature == 8 ? (int)temperature
                                                                                                   : kAnyTemperature;

  // The exponentials of the sums are saved for the gradients if those of a row fit into the L2 cache. In
  // float32, with 32 registers and one exponential per class, the limit is lower: recomputing them costs
  // no time, because the loop waits for memory.
  const int64_t saved_vectors = version == kAnyTemperature ? 5 : 3;  // e of both, g, and e1 of both
  const int64_t saved_limit = (kHas32Registers && sizeof(S) == 4 && version != kAnyTemperature ? 48 : 512) << 10;
  const bool saves = saved_vectors * padded * (int64_t)sizeof(R) <= saved_limit;
  const int64_t vector_stride = padded + W;  // with a vector more, arrays are not a power of two apart
  const int64_t slot_size = vector_stride * (has_probabilities + (saves ? saved_vectors : 0));
  const int64_t slots = saves ? kGroupBytes / (slot_size * (int64_t)sizeof(R)) : 1;
  const int group_rows = slots > kGroupRows ? kGroupRows : slots > 1 ? (int)slots : 1;
  R* const memory = scratch<R>(group_rows * slot_size);

  // In rows with saved exponentials, logits are prefetched this many rows and classes ahead.
  const bool is_long = classes > 2 * kChunkClasses;
  const int64_t prefetch_rows = is_long ? 1 : 1 + (kPrefetchBytes - 1) / (2 * classes * (int64_t)sizeof(S));
  const int64_t prefetch_classes = is_long ? 2 * kChunkClasses : 0;

  // Rows with few classes do not fill whole cache lines, so they use ordinary stores.
  const bool nontemporal = call.nontemporal && classes >= 16 * W;

  // Returns (padded,): the smoothed target probabilities of the row in this slot, padded with 0.
  INLINE R* probabilities(int slot) const { return memory + slot * slot_size; }
  // Returns (saved_vectors, padded): e of student and teacher, g, and for kAnyTemperature e1 of both.
  INLINE R* saved(int slot) const { return probabilities(slot) + vector_stride * has_probabilities; }

  Pair<const S*> rows_below(Pair<const S*> row, int64_t n) const {
    return {row.student + n * call.student.stride, row.teacher + n * call.teacher.stride};
  }
};

// ---- the rows of a group, one per slot ----------------------------------------------------------

using Slots = double[kGroupRows];

struct NetworkSums {
  Slots max{};                                      // of the logits
  Slots e{}, e1{}, e_x{}, e1_x{}, e_g{};            // sums over the classes of e, e1, e x, e1 x, e g
  Slots x{}, q_x{}, q{};                            // sums of x, q x and q, for a target distribution q
  Slots label_x{}, is_correct{}, upstream{};        // x of the label; upstream gradient

  void clear(int slot) { e[slot] = e1[slot] = e_x[slot] = e1_x[slot] = e_g[slot] = 0; }
};

struct Group {
  NetworkSums student, teacher;
  Slots e_difference{};  // sum of e_teacher - e_student
  Slots is_counted{};    // 0: the row is ignored
  Slots target_sum{}, weight{};
  int64_t label[kGroupRows]{};
  bool is_masked[kGroupRows]{};  // a value is not finite, so the row needs the general loops

  void clear(int slot) {
    student.clear(slot), teacher.clear(slot);
    e_difference[slot] = 0;
  }
};

// The coefficients k of a network's gradient, which for each class is
//   e (g k.e_g + k.e) - e_of_the_other_network k.other_e + e1 k.e1 - q k.target - k.uniform
// for a target distribution q: probabilities, or 1 at the label.
template <class R>
struct Coefficients {
  using Slots = R[kGroupRows];
  Slots e_g{}, e{}, other_e{}, e1{}, target{}, uniform{};
};

// A row whose sums are known and whose gradients are not yet computed.
template <class S>
struct PendingGradient {
  bool exists = false, is_masked = false;
  Pair<const S*> row{};
  Pair<S*> gradient{};
  int64_t label = 0;
  Pair<typename RowPlan<S>::R> max{};
  int64_t classes_done = 0;
};

// The maxima of a row or chunk. The loop over the sums of the previous row or chunk has computed them.
template <class S>
struct NextMax {
  Pair<const S*> row{};
  Pair<typename RowPlan<S>::R> max{};
};

// The state of one thread.
template <class S>
struct RowState {
  const RowPlan<S> plan;
  Pair<Coefficients<typename RowPlan<S>::R>> coefficients{};
  PendingGradient<S> pending[kGroupRows]{};
  NextMax<S> next_max{};
};

// Classes begin .. end of a row for the sums, and the other work of the same loop.
template <class S>
struct Chunk {
  int slot;
  Pair<const S*> row;       // the logits, from class 0 on
  int64_t begin, end;
  Pair<const S*> next{};      // as many classes, whose maxima are computed; or null
  Pair<const S*> prefetch;    // as many classes, which are prefetched
  Pair<const S*> gradient{};  // the row's gradients, prefetched for writing; or null
  bool is_masked = false;
};

}  // namespace
}  // namespace BDKD_ISA
