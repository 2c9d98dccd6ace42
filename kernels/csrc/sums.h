// The pass over a row that computes all of its sums.
#pragma once
#include "row_helpers.h"

namespace BDKD_ISA {
namespace {

// e1 = exp(x) is e = exp(x / temperature) to the power of the temperature. If the temperature is 2, 4 or
// 8, this returns the square root of e1, so that the caller can fuse the last multiplication. Otherwise
// it returns e1.
template <int version, class V>
INLINE V root_of_e1(V e, V x, int plan_version) {
  using R = std::decay_t<decltype(e[0])>;
  const int n = version == kGeneral ? plan_version : version;
  if (n == kAnyTemperature) return exp2_of<R>(x, V{} + (R)kLog2E);
  if (n > 2) e *= e;
  if (n > 4) e *= e;
  return e;
}

template <int version>
INLINE bool is_root(int plan_version) {
  return (version == kGeneral ? plan_version : version) > 1;
}

template <int version, class V>
INLINE V e1_of(V e, V x, int plan_version) {
  const V root = root_of_e1<version>(e, x, plan_version);
  return is_root<version>(plan_version) ? root * root : root;
}

// Returns e x. In a masked row, x can be infinite if e is 0. The product is then 0.
template <int version, class V>
INLINE V product(V e, V x, bool is_masked) {
  return version == kGeneral && is_masked ? (e == 0 ? V{} : e * x) : e * x;
}

// Computes the sums of a chunk. This loop has the most arithmetic, so memory accesses can overlap with
// it: it prefetches logits, and with 32 registers it also computes the maxima of the next chunk.
template <class S, int version, bool saved>
class SumLoop {
  using Plan = RowPlan<S>;
  using R = typename Plan::R;
  using V = typename Plan::V;
  static constexpr int64_t W = Plan::W;
  static constexpr bool general = version == kGeneral;

  struct LaneSums {
    V e{}, e1{}, e_x{}, e1_x{}, e_g{};
  };

  const Pair<const S*> row, next, prefetch, gradient;  // all are indexed by class
  const Pair<R> max;
  const V log2_scale, floor = (R)kFloor / log2_scale, floor_at_1 = V{} + (R)(kFloor / kLog2E);
  const int64_t classes, begin, end, vector_stride;
  const int plan_version, slot;
  const bool is_masked, any_kd, saves, entropy_at_1;
  R* const memory;
  Pair<LaneSums> sums;
  V e_difference;
  Pair<V> next_max{V{} - (R)INFINITY, V{} - (R)INFINITY};

 public:
  INLINE SumLoop(const Plan& plan, const Chunk<S>& chunk, const Group& group)
      : row(chunk.row), next((chunk.next.student ? chunk.next : chunk.row) + -chunk.begin),
        prefetch(chunk.prefetch + -chunk.begin), gradient(chunk.gradient),
        max{(R)group.student.max[chunk.slot], (R)group.teacher.max[chunk.slot]}, log2_scale(V{} + plan.log2_scale),
        classes(plan.classes), begin(chunk.begin), end(chunk.end), vector_stride(plan.vector_stride),
        plan_version(plan.version), slot(chunk.slot), is_masked(general && chunk.is_masked),
        any_kd(!general || plan.any_kd), saves(general ? plan.saves : saved),
        entropy_at_1(general && plan.entropy_at_1), memory(plan.saved(chunk.slot)) {}

  // Adds the chunk's sums to the group. Calls `before_vector` before each vector of classes.
  template <bool prefetch_gradient, class F>
  INLINE void run(Group& group, F before_vector) {
    for (int64_t block = begin; block < end; block += kBlockVectors * W) {
      sums = {}, e_difference = V{};
      const int64_t stop = block + kBlockVectors * W < end ? block + kBlockVectors * W : end;
      int64_t i = block;
      for (; i + W <= stop; i += W) before_vector(), add<true, prefetch_gradient>(i);
      if (i < stop) before_vector(), add<false, prefetch_gradient>(i);
      both([&](const LaneSums& from, NetworkSums& to) INLINE_LAMBDA { reduce(from, to); }, sums, group);
      group.e_difference[slot] += lane_sum<R>(e_difference);
    }
  }

  INLINE NextMax<S> maxima(Pair<const S*> of) const {
    return {of, {lane_max(next_max.student), lane_max(next_max.teacher)}};
  }

 private:
  template <bool whole>
  INLINE V load_classes(const S* from, int64_t i) const {
    if constexpr (whole) return load<R>(from + i);
    else return load_partial<R>(from + i, classes - i);
  }

  // Adds the vector of classes that begins at i. If it is not `whole`, the row ends within it.
  template <bool whole, bool prefetch_gradient>
  INLINE void add(int64_t i) {
    Pair<V> x = both([&](const S* from, R max) INLINE_LAMBDA { return load_classes<whole>(from, i) - max; }, row, max);
    Pair<V> e = both([&](V x) INLINE_LAMBDA {
      return exp2_of<R>(is_masked ? larger<V>(floor, x) : x, log2_scale);
    }, x);
    Pair<V> e1 = both([&](V e, V x) INLINE_LAMBDA {
      return root_of_e1<version>(e, is_masked ? larger<V>(floor_at_1, x) : x, plan_version);
    }, e, x);
    both([&](const S* from) INLINE_LAMBDA { __builtin_prefetch(from + i); }, prefetch);
    if (prefetch_gradient)
      both([&](const S* to) INLINE_LAMBDA { if (to) __builtin_prefetch(to + i, 1); }, gradient);
    if constexpr (kHas32Registers) add_next_max<whole>(i);
    if constexpr (!whole) {
      const Mask<R> is_class = first_lanes<R>(classes - i);
      const auto clear_rest = [&](V& v) INLINE_LAMBDA { v = is_class ? v : V{}; };
      both(clear_rest, e), both(clear_rest, e1), both(clear_rest, x);
    }
    const V g = x.teacher - x.student;
    if (saves) save(i, e, g, e1);
    accumulate(x, e, e1, g);
  }

  template <bool whole>
  INLINE void add_next_max(int64_t i) {
    both([&](V& max, const S* from) INLINE_LAMBDA {
      const V v = larger<V>(max, load_classes<whole>(from, i));
      if constexpr (whole) max = v;
      else max = first_lanes<R>(classes - i) ? v : max;
    }, next_max, next);
  }

  INLINE void save(int64_t i, Pair<V> e, V g, Pair<V> e1) const {
    R* to = memory + i;
    store<R>(to, e.student), store<R>(to += vector_stride, e.teacher), store<R>(to += vector_stride, g);
    if (version == kAnyTemperature || (general && plan_version == kAnyTemperature))
      store<R>(to += vector_stride, e1.student), store<R>(to += vector_stride, e1.teacher);
  }

  // e1 may be the square root of e1; see root_of_e1.
  INLINE void accumulate(const Pair<V>& x, const Pair<V>& e, const Pair<V>& e1, V g) {
    both([](LaneSums& to, V e) INLINE_LAMBDA { to.e += e; }, sums, e);
    if constexpr (version != 1)
      both([&](LaneSums& to, V e1) INLINE_LAMBDA {
        to.e1 = is_root<version>(plan_version) ? multiply_add<V>(e1, e1, to.e1) : to.e1 + e1;
      }, sums, e1);
    if (any_kd) {
      e_difference += e.teacher - e.student;
      both([&](LaneSums& to, V e, V x) INLINE_LAMBDA { to.e_x += product<version>(e, x, is_masked); }, sums, e, x);
      both([&](LaneSums& to, V e) INLINE_LAMBDA { to.e_g += product<version>(e, g, is_masked); }, sums, e);
    }
    if (entropy_at_1)
      both([&](LaneSums& to, V e1, V x) INLINE_LAMBDA {
        to.e1_x += product<version>(is_root<version>(plan_version) ? e1 * e1 : e1, x, is_masked);
      }, sums, e1, x);
  }

  INLINE void reduce(const LaneSums& from, NetworkSums& to) const {
    to.e[slot] += lane_sum<R>(from.e), to.e1[slot] += lane_sum<R>(from.e1);
    to.e_x[slot] += lane_sum<R>(from.e_x), to.e_g[slot] += lane_sum<R>(from.e_g);
    if (entropy_at_1) to.e1_x[slot] += lane_sum<R>(from.e1_x);
  }
};

template <class S, int version, bool saved>
NOINLINE void sums(RowState<S>& state, const Chunk<S>& chunk, Group& group) {
  SumLoop<S, version, saved> loop(state.plan, chunk, group);
  loop.template run<true>(group, []() INLINE_LAMBDA {});
  if constexpr (kHas32Registers) state.next_max = loop.maxima(chunk.next);
}

// Rescales the sums of a row to the maxima of its next chunk, if these are larger.
template <class S>
NOINLINE void raise_max(const RowPlan<S>& plan, int slot, Pair<double> max, Group& group) {
  NetworkSums &s = group.student, &t = group.teacher;
  const double raise_s = max.student - s.max[slot], raise_t = max.teacher - t.max[slot];
  const bool is_first_chunk = s.e[slot] == 0;
  if (raise_s > 0 || is_first_chunk) s.max[slot] = max.student;
  if (raise_t > 0 || is_first_chunk) t.max[slot] = max.teacher;
  if (is_first_chunk || !(raise_s > 0 || raise_t > 0)) return;
  const double by_s = raise_s > 0 ? raise_s : 0, by_t = raise_t > 0 ? raise_t : 0;
  const double factor_s = std::exp(-by_s / plan.temperature), factor_t = std::exp(-by_t / plan.temperature);
  group.e_difference[slot] = factor_t * group.e_difference[slot] + (factor_t - factor_s) * s.e[slot];
  // x falls by `by` and g = x_t - x_s rises by by_s - by_t, in every class.
  const auto rescale = [slot, g_rise = by_s - by_t](NetworkSums& of, double by, double factor, double factor_at_1) {
    of.e_g[slot] = factor * (of.e_g[slot] + g_rise * of.e[slot]);
    of.e_x[slot] = factor * (of.e_x[slot] - by * of.e[slot]);
    of.e1_x[slot] = factor_at_1 * (of.e1_x[slot] - by * of.e1[slot]);
    of.e[slot] *= factor, of.e1[slot] *= factor_at_1;
  };
  rescale(s, by_s, factor_s, std::exp(-by_s));
  rescale(t, by_t, factor_t, std::exp(-by_t));
}

}  // namespace
}  // namespace BDKD_ISA
