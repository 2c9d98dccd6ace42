// The pass over a row that computes its gradients from saved or recomputed exponentials.
#pragma once
#include "sums.h"

namespace BDKD_ISA {
namespace {

// Computes a row's gradients, one vector of classes after the other. Absent terms have coefficients of
// 0. A `fused` loop runs together with the sums of another row. It writes the gradients of both
// networks with non-temporal stores, and supports no target but a label.
template <class S, int version, bool saved, bool fused>
class GradientLoop {
  using Plan = RowPlan<S>;
  using R = typename Plan::R;
  using V = typename Plan::V;
  static constexpr int64_t W = Plan::W;
  static constexpr bool general = version == kGeneral;

  struct LaneCoefficients {  // in all lanes
    V e_g, e, other_e, e1, target, uniform;
    INLINE LaneCoefficients(const Coefficients<R>& k, int slot)
        : e_g(V{} + k.e_g[slot]), e(V{} + k.e[slot]), other_e(V{} + k.other_e[slot]), e1(V{} + k.e1[slot]),
          target(V{} + k.target[slot]), uniform(V{} + k.uniform[slot]) {}
  };

  const Pair<LaneCoefficients> k;
  const V log2_scale, floor = (R)kFloor / log2_scale, floor_at_1 = V{} + (R)(kFloor / kLog2E);
  const int64_t classes, label, vector_stride;  // label: -1 if the target is not a label
  const int plan_version;
  const R *const probabilities, *const memory;
  const bool has_probabilities, smooths_labels, nontemporal, teacher_forward;
  const Pair<bool> has_kd, has_ce;
  const Pair<const S*> row;
  const Pair<S*> gradient;
  const Pair<R> max;

  struct Exponentials {
    Pair<V> e, e1;
    V g;
  };

 public:
  int64_t i;  // the next class

  INLINE GradientLoop(const RowState<S>& state, const Plan& plan, const PendingGradient<S>& pending, int slot)
      : k{{state.coefficients.student, slot}, {state.coefficients.teacher, slot}}, log2_scale(V{} + plan.log2_scale),
        classes(plan.classes), label(plan.has_labels ? pending.label : -1), vector_stride(plan.vector_stride),
        plan_version(plan.version), probabilities(plan.probabilities(slot)), memory(plan.saved(slot)),
        has_probabilities(plan.has_probabilities), smooths_labels(plan.smooths_labels), nontemporal(plan.nontemporal),
        teacher_forward(plan.teacher_forward), has_kd(plan.has_kd), has_ce(plan.has_ce), row(pending.row),
        gradient(pending.gradient), max(pending.max), i(pending.classes_done) {
    // Non-temporal stores need aligned vectors. The classes before the first one are stored separately.
    if ((fused || nontemporal) && i == 0) {
      const auto address = (uintptr_t)(gradient.student ? gradient.student : gradient.teacher);
      const int64_t head = -address % (W * sizeof(S)) / sizeof(S);
      if (head) write<false>(head < classes ? head : classes);
    }
  }

  INLINE void run() {
    while (i + W <= classes) write<true>(i + W);
    if (i < classes) write<false>(classes);
  }

  INLINE void write_vector() {  // does nothing after the last vector
    if (i + W <= classes) write<true>(i + W);
    else if (i < classes) write<false>(classes);
  }

 private:
  // Writes the gradients of classes i .. end; `whole`: a full vector.
  template <bool whole>
  INLINE void write(int64_t end) {
    const Exponentials of = saved ? load_saved() : compute<whole>(end);
    Pair<V> d = general ? general_linear(of) : linear(of);
    if (!fused && has_probabilities) {
      const V q = loaded<V>(probabilities + i);
      both([&](V& d, const LaneCoefficients& k, bool has_ce) INLINE_LAMBDA {
        if (has_ce) d -= q * k.target;
      }, d, k, has_ce);
    }
    if (!fused && smooths_labels) both([](V& d, const LaneCoefficients& k) INLINE_LAMBDA { d -= k.uniform; }, d, k);
    if ((uint64_t)(label - i) < (uint64_t)(end - i)) {
      const Mask<R> at_label = first_lanes<R>(label - i + 1) & ~first_lanes<R>(label - i);
      both([&](V& d, const LaneCoefficients& k) INLINE_LAMBDA { d -= at_label ? k.target : V{}; }, d, k);
    }
    both([&](S* to, V d) INLINE_LAMBDA { put<whole>(to, d, end); }, gradient, d);
    i = end;
  }

  INLINE Exponentials load_saved() const {
    const R* from = memory + i;
    Exponentials of;
    of.e.student = load<R>(from), of.e.teacher = load<R>(from += vector_stride), of.g = load<R>(from += vector_stride);
    if constexpr (version == kAnyTemperature)
      of.e1.student = load<R>(from += vector_stride), of.e1.teacher = load<R>(from += vector_stride);
    else
      of.e1 = both([](V e) INLINE_LAMBDA { return e1_of<version>(e, V{}, 0); }, of.e);
    return of;
  }

  template <bool whole>
  INLINE Exponentials compute(int64_t end) const {
    Pair<V> x = both([&](const S* from, R max) INLINE_LAMBDA {
      if constexpr (whole) return load<R>(from + i) - max;
      else return load_partial<R>(from + i, end - i) - max;
    }, row, max);
    Exponentials of;
    of.g = x.teacher - x.student;
    of.e = both([&](V x) INLINE_LAMBDA { return exp2_of<R>(general ? larger<V>(floor, x) : x, log2_scale); }, x);
    of.e1 = both([&](V e, V x, S* gradient, bool has_ce) INLINE_LAMBDA {
      if (version <= kAnyTemperature && !(gradient && has_ce)) return V{};  // saves an exponential
      return e1_of<version>(e, general ? larger<V>(floor_at_1, x) : x, plan_version);
    }, of.e, x, gradient, has_ce);
    return of;
  }

  INLINE Pair<V> linear(const Exponentials& of) const {
    const auto gradient_of = [&](V e, V other_e, V e1, const LaneCoefficients& k) INLINE_LAMBDA {
      const V factor = multiply_add<V>(of.g, k.e_g, k.e);
      return multiply_add<V>(e1, k.e1, multiply_add<V>(e, factor, -(other_e * k.other_e)));
    };
    return {gradient_of(of.e.student, of.e.teacher, of.e1.student, k.student),
            gradient_of(of.e.teacher, of.e.student, of.e1.teacher, k.teacher)};
  }

  // Returns the same for a masked row. There g may be infinite, so 0 * inf and inf - inf are avoided.
  INLINE Pair<V> general_linear(const Exponentials& of) const {
    const auto gradient_of = [&](V e, V other_e, V e1, const LaneCoefficients& k, bool has_g, bool has_kd,
                                 bool has_ce) INLINE_LAMBDA {
      V d{};
      if (has_kd) d = product<version>(e, has_g ? of.g * k.e_g + k.e : k.e, true) - other_e * k.other_e;
      if (has_ce) d += e1 * k.e1;
      return d;
    };
    return {gradient_of(of.e.student, of.e.teacher, of.e1.student, k.student, true, has_kd.student, has_ce.student),
            gradient_of(of.e.teacher, of.e.student, of.e1.teacher, k.teacher, teacher_forward, has_kd.teacher,
                        has_ce.teacher)};
  }

  template <bool whole>
  INLINE void put(S* to, V d, int64_t end) const {
    if (!fused && !to) return;
    if constexpr (!whole) store_partial<R>(to + i, d, end - i);
    else if (fused || nontemporal) store_nontemporal<R>(to + i, d);
    else store<R>(to + i, d);
  }
};

// Computes the pending gradients of the row in this slot.
template <class S, int version, bool saved>
NOINLINE void gradients(RowState<S>& state, int slot) {
  GradientLoop<S, version, saved, false> loop(state, state.plan, state.pending[slot], slot);
  loop.run();
}

// Computes a chunk's sums, and the gradients of as many classes of the row that was in its slot
// before. The sums are limited by arithmetic and loads, the gradients by stores. The chunk's saved
// exponentials replace those of that row vector by vector.
template <class S, int version, bool saved>
NOINLINE void sums_and_gradients(RowState<S>& state, const Chunk<S>& chunk, Group& group) {
  GradientLoop<S, version, saved, true> gradients(state, state.plan, state.pending[chunk.slot], chunk.slot);
  SumLoop<S, version, saved> loop(state.plan, chunk, group);
  loop.template run<false>(group, [&]() INLINE_LAMBDA { gradients.write_vector(); });
  state.next_max = loop.maxima(chunk.next);
  state.pending[chunk.slot].classes_done = gradients.i;
}

}  // namespace
}  // namespace BDKD_ISA
