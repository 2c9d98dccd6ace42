// The row kernels of one instruction set. BDKD_ISA is its name and the namespace of this code.
//
// A row is computed in four steps: the maxima of both networks, all sums (sums.h), the losses and
// coefficients (row_math.h), the gradients (gradients.h). With 32 registers, one loop computes three
// steps at once: the maxima of the next row, the sums of this row, the gradients of an earlier row.
#include "gradients.h"
#include "row_math.h"

namespace BDKD_ISA {
namespace {

// The versions of the loops that fit a call.
template <class S>
struct Loops {
  void (*sums)(RowState<S>&, const Chunk<S>&, Group&);
  void (*sums_and_gradients)(RowState<S>&, const Chunk<S>&, Group&);  // or null
  void (*gradients)(RowState<S>&, int);
};

template <class S, int version, bool saved>
Loops<S> loops_of_version() {
  // Gradients of 2 bytes with recomputed exponentials also wait for arithmetic. One loop is not faster then.
  if constexpr (kHas32Registers && RowPlan<S>::W == 16 && (saved || sizeof(S) == 4))
    return {sums<S, version, saved>, sums_and_gradients<S, version, saved>, gradients<S, version, saved>};
  else
    return {sums<S, version, saved>, nullptr, gradients<S, version, saved>};
}

template <class S, bool saved>
Loops<S> loops_of(int version) {
  return version == 1   ? loops_of_version<S, 1, saved>()
         : version == 2 ? loops_of_version<S, 2, saved>()
         : version == 4 ? loops_of_version<S, 4, saved>()
         : version == 8 ? loops_of_version<S, 8, saved>()
                        : loops_of_version<S, kAnyTemperature, saved>();
}

template <class S>
Loops<S> choose_loops(const RowPlan<S>& plan) {
  Loops<S> loops = plan.saves ? loops_of<S, true>(plan.version) : loops_of<S, false>(plan.version);
  if (plan.entropy_at_1) loops.sums = sums<S, kGeneral, false>;
  const bool both_gradients = plan.call.student.gradient && plan.call.teacher.gradient;
  const bool can_fuse = plan.nontemporal && both_gradients && !plan.has_probabilities && !plan.smooths_labels;
  if (!can_fuse || plan.entropy_at_1) loops.sums_and_gradients = nullptr;
  return loops;
}

template <class S>
struct Row {
  int64_t number;
  Pair<const S*> logits;
  Pair<S*> gradient;  // null: not needed
};

// Computes rows, a group at a time, in one thread.
template <class S>
class RowWorker {
  using R = typename RowPlan<S>::R;

  RowState<S> state;
  const RowPlan<S>& plan = state.plan;
  const Call& call = plan.call;
  const int64_t classes = plan.classes;
  const Loops<S> loops = choose_loops(plan);

 public:
  const int group_rows = plan.group_rows;
  const int64_t padded_classes = plan.padded;

  explicit RowWorker(const Call& call) : state{{call}} {}

  // Computes `count` <= group_rows rows. Prepares the row after each one if it is before `end`, because
  // this thread probably computes it next. Gradients may still be pending afterwards: `finish` computes
  // them.
  void run(const Row<S>& first, int count, int64_t end) {
    Group group;
    Row<S> rows[kGroupRows];
    for (int slot = 0; slot < count; ++slot) {
      const Row<S>& row = rows[slot] = row_below(first, slot);
      group.is_counted[slot] = !is_ignored(row.number);
      if (group.is_counted[slot]) add_row(row, slot, end, group);
      else both([&](S* gradient) { if (gradient) memset((void*)gradient, 0, classes * sizeof(S)); }, row.gradient);
    }
    finish();  // computes the gradients that are still pending in slots of the last group
    scalars(state, group, first.number, count);
    if (!first.gradient.student && !first.gradient.teacher) return;
    for (int slot = 0; slot < count; ++slot) {
      state.pending[slot] = {group.is_counted[slot] != 0, group.is_masked[slot], rows[slot].logits,
                             rows[slot].gradient, group.label[slot],
                             {(R)group.student.max[slot], (R)group.teacher.max[slot]}};
      if (!loops.sums_and_gradients) compute_pending(slot);
    }
  }

  void finish() {
    for (int slot = 0; slot < group_rows; ++slot) compute_pending(slot);
  }

 private:
  Row<S> row_below(const Row<S>& row, int64_t n) const {
    const auto below = [n](S* gradient, const Network& network) {
      return gradient ? gradient + n * network.gradient_stride : nullptr;
    };
    return {row.number + n, plan.rows_below(row.logits, n), both(below, row.gradient, call)};
  }

  void compute_pending(int slot) {
    PendingGradient<S>& pending = state.pending[slot];
    if (!pending.exists) return;
    (pending.is_masked ? gradients<S, kGeneral, false> : loops.gradients)(state, slot);
    pending.exists = false;
  }

  bool is_ignored(int64_t row) const {
    return plan.has_labels && ((const int64_t*)call.target)[row] == plan.options.ignore_index;
  }

  // Computes a row's sums and the other values of the row in its group.
  void add_row(const Row<S>& row, int slot, int64_t end, Group& group) {
    int64_t label = plan.has_labels ? ((const int64_t*)call.target)[row.number] : -1;
    const bool is_invalid = plan.has_labels && (label < 0 || label >= classes);
    if (is_invalid) label = 0;
    if (plan.has_probabilities) label = read_probabilities<R>(call, row.number, plan.probabilities(slot));
    group.label[slot] = label;
    add_sums(row, slot, end, group);
    if (plan.version == 1)
      both([slot](NetworkSums& of) { of.e1[slot] = of.e[slot], of.e1_x[slot] = of.e_x[slot]; }, group);
    both([&](NetworkSums& of, const S* logits, const Network& network, bool has_ce) INLINE_LAMBDA {
      if (label >= 0) {
        of.label_x[slot] = value_of(logits[label]) - of.max[slot];
        of.is_correct[slot] = is_label_argmax(logits, label, classes, of.label_x[slot], of.max[slot]);
      }
      if (has_ce && (plan.has_probabilities || plan.smooths_labels)) target_sums(plan, logits, slot, of);
      if (is_invalid) of.label_x[slot] = NAN;
      of.upstream[slot] = network.upstream ? (double)((const R*)network.upstream)[row.number] : network.scale;
    }, group, row.logits, call, plan.has_ce);
    const NetworkSums& with_q = plan.has_ce.student ? group.student : group.teacher;
    group.target_sum[slot] = is_invalid ? NAN : plan.has_probabilities ? with_q.q[slot] : 1;
    group.weight[slot] = call.weight ? (double)((const R*)call.weight)[row.number] : 1;
  }

  // Computes a row's maxima and sums, and the gradients that are pending in its slot.
  void add_sums(const Row<S>& row, int slot, int64_t end, Group& group) {
    const Pair<const S*> to_prefetch = prefetch_gradient(row);
    const bool fused = state.pending[slot].exists && !state.pending[slot].is_masked && loops.sums_and_gradients;
    if (!fused) compute_pending(slot);
    const auto loop = fused ? loops.sums_and_gradients : loops.sums;
    const Pair<const S*> logits = row.logits;
    if (plan.saves) {
      both([slot](NetworkSums& of, R max) { of.max[slot] = max; }, group, maxima(logits, classes));
      const auto next = row.number + 1 < end ? plan.rows_below(logits, 1) : Pair<const S*>{};
      const auto prefetch = plan.rows_below(logits, plan.prefetch_rows) + plan.prefetch_classes;
      loop(state, {slot, logits, 0, classes, next, prefetch, to_prefetch}, group);
    } else {
      for (int64_t begin = 0; begin < classes; begin += kChunkClasses) {
        const int64_t stop = begin + kChunkClasses < classes ? begin + kChunkClasses : classes;
        const Pair<R> max = maxima(logits + begin, stop - begin);
        raise_max(plan, slot, {max.student, max.teacher}, group);
        const auto next = stop + kChunkClasses <= classes ? logits + stop : Pair<const S*>{};
        loop(state, {slot, logits, begin, stop, next, logits + (begin + 2 * kChunkClasses), to_prefetch}, group);
      }
    }
    compute_pending(slot);  // the gradients that the loop has not computed
    // A value that is not finite, such as -inf of a masked class, has made a sum NaN.
    const auto is_finite = [slot](const NetworkSums& of) {
      return std::isfinite(of.e1[slot] + of.e_x[slot] + of.e1_x[slot] + of.e_g[slot]);
    };
    group.is_masked[slot] = !is_finite(group.student) || !is_finite(group.teacher);
    if (group.is_masked[slot]) add_masked_sums(logits, slot, group);
  }

  void add_masked_sums(Pair<const S*> logits, int slot, Group& group) {
    group.clear(slot);
    both([&](NetworkSums& of, const S* row) { of.max[slot] = row_max<R>(row, classes); }, group, logits);
    sums<S, kGeneral, false>(state, {slot, logits, 0, classes, {}, logits, {}, true}, group);
  }

  // Returns the maxima of `count` classes. Usually an earlier loop has already computed them.
  Pair<R> maxima(Pair<const S*> logits, int64_t count) const {
    const NextMax<S>& next = state.next_max;
    if (next.row.student == logits.student && next.row.teacher == logits.teacher) return next.max;
    return both([count](const S* row) { return (R)row_max<R>(row, count); }, logits);
  }

  // Returns the gradients that the loop over the sums prefetches. With non-temporal stores, only the
  // cache lines that a row shares with its neighbours are prefetched, here.
  Pair<const S*> prefetch_gradient(const Row<S>& row) const {
    if (!plan.nontemporal) return {row.gradient.student, row.gradient.teacher};
    both([&](const S* gradient) {
      if (gradient) __builtin_prefetch(gradient, 1), __builtin_prefetch(gradient + classes - 1, 1);
    }, row.gradient);
    return {};
  }
};

// On x86, flushes exponentials below the normal range to 0. Otherwise each would take 150 cycles.
struct FlushSubnormals {
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  FlushSubnormals() { _mm_setcsr(mode | 0x8040); }
  ~FlushSubnormals() { _mm_sfence(), _mm_setcsr(mode); }
#endif
};

// The blocks of rows that one thread takes, one after the other.
struct BlockReader {
  WorkQueue& queue;
  // The range that this thread takes from, and how many ranges may still have rows.
  int64_t range = __atomic_fetch_add(&queue.threads_started, 1, __ATOMIC_RELAXED) % queue.range_count;
  int64_t ranges_left = queue.range_count;
  int64_t begin{}, end{}, range_end{};

  bool next() {
    for (; ranges_left; --ranges_left, range = (range + 1) % queue.range_count) {
      WorkQueue::Range& from = queue.ranges[range];
      begin = __atomic_fetch_add(&from.next, queue.block_rows, __ATOMIC_RELAXED), range_end = from.end;
      end = begin + queue.block_rows < range_end ? begin + queue.block_rows : range_end;
      if (begin < range_end) return true;
    }
    return false;
  }
};

template <class S>
S* gradient_row(const Network& network, int64_t row) {
  return network.gradient ? (S*)network.gradient + row * network.gradient_stride : nullptr;
}

template <class S>
void run(const Call& call, WorkQueue& queue) {
  const FlushSubnormals flush;
  RowWorker<S> worker(call);
  for (BlockReader block{queue}; block.next();)
    for (int64_t row = block.begin; row < block.end; row += worker.group_rows) {
      const auto logits = [row](const Network& of) { return (const S*)of.logits + row * of.stride; };
      const auto gradient = [row](const Network& of) { return gradient_row<S>(of, row); };
      const int64_t left = block.end - row;
      worker.run({row, both(logits, call), both(gradient, call)}, left < worker.group_rows ? left : worker.group_rows,
                 block.range_end);
    }
  worker.finish();
}

// For two storage types. Each row is copied to the compute type, and its gradients replace the copy.
template <class R>
void run_mixed(const Call& mixed, WorkQueue& queue) {
  Call call = mixed;
  call.nontemporal = false;
  RowWorker<R> worker(call);
  const int64_t padded = worker.padded_classes;
  const std::unique_ptr<R[]> memory(new R[2 * padded]);
  const Pair<R*> copy{memory.get(), memory.get() + padded};
  for (BlockReader block{queue}; block.next();)
    for (int64_t row = block.begin; row < block.end; ++row) {
      // Convert outside of FlushSubnormals: subnormal float32 numbers are normal in float64.
      both([&](const Network& of, R* to) { widen<R>(of.storage, of.logits, row * of.stride, call.classes, to); },
           call, copy);
      {
        const FlushSubnormals flush;
        const auto gradient = [](const Network& of, R* copy) { return of.gradient ? copy : nullptr; };
        worker.run({row, {copy.student, copy.teacher}, both(gradient, call, copy)}, 1, row + 1);
        worker.finish();
      }
      both([&](const Network& of, const R* from) {
        if (of.gradient) narrow<R>(of.storage, from, call.classes, of.gradient, row * of.gradient_stride);
      }, call, copy);
    }
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {{run<float>, run<double>, run<Half>, run<Bfloat>}, run_mixed<float>, run_mixed<double>};

}  // namespace BDKD_ISA
