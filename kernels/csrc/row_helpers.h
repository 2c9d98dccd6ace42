// Passes over a row without exponentials: maxima, labels, conversion of the storage type.
#pragma once
#include <limits>

#include "row_plan.h"

namespace BDKD_ISA {
namespace {

// Returns the maximum of a row of a 2-byte type without converting the row. Compared as integers, the
// bits of positive numbers are in order, and those of negative numbers are in reverse order. Positive
// numbers are larger than negative ones. The row must have at least one full vector.
template <class R, class S>
NOINLINE double row_max_of_bits(const S* row, int64_t count) {
  constexpr int W = BDKD_BYTES / 2, half = lanes<R>;
  using B = Vec<int16_t, W>;
  using V = Vec<R, half>;
  B largest = loaded<B>(row), smallest = largest;
  const auto take = [&](int64_t i) INLINE_LAMBDA {
    const B v = loaded<B>(row + i);
    largest = v > largest ? v : largest, smallest = v < smallest ? v : smallest;
  };
  for (int64_t i = W; i + W <= count; i += W) take(i);
  take(count - W);  // the last vector overlaps the one before
  largest = largest >= 0 ? largest : smallest;
  V halves[2];
  for (int k = 0; k < 2; ++k) halves[k] = load<R>((const S*)&largest + k * half);
  return lane_max(larger<V>(halves[0], halves[1]));
}

// Returns the maximum of a row. For a row with a NaN, the value is arbitrary, because its sums are NaN.
template <class R, class S>
INLINE double row_max(const S* row, int64_t count) {
  constexpr int W = lanes<R>;
  if constexpr (sizeof(S) == 2)
    if (count >= 8 * W) return row_max_of_bits<R, S>(row, count);
  using V = Vec<R, W>;
  V a = V{} - (R)INFINITY, b = a;
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    a = larger<V>(a, load<R>(row + i));
    b = larger<V>(b, load<R>(row + i + W));
  }
  if (i + W <= count) a = larger<V>(a, load<R>(row + i)), i += W;
  if (i < count) {
    const V rest = load_partial<R>(row + i, count - i);
    b = first_lanes<R>(count - i) ? larger<V>(b, rest) : b;
  }
  return lane_max(larger<V>(a, b));
}

// Returns whether no class before `label` has the logit `max`, so that `label` is the argmax.
template <class R, class S>
bool is_first(const S* row, int64_t label, double max) {
  constexpr int W = lanes<R>;
  Mask<R> equal{};
  int64_t i = 0;
  for (; i + W <= label; i += W) equal |= load<R>(row + i) == (Vec<R, W>{} + (R)max);
  if (i < label)
    equal |= (load_partial<R>(row + i, label - i) == (Vec<R, W>{} + (R)max)) & first_lanes<R>(label - i);
  return !any(equal);
}

// Returns whether `label` is the argmax. Compares bits, because a comparison of floats finds subnormal
// numbers equal if they are flushed to 0.
template <class S>
NOINLINE bool is_argmax_by_bits(const S* row, int64_t label, int64_t count) {
  using I = std::conditional_t<sizeof(S) == 2, int16_t, std::conditional_t<sizeof(S) == 4, int32_t, int64_t>>;
  const auto order = [row](int64_t i) {
    I bits;
    memcpy(&bits, row + i, sizeof bits);
    return bits < 0 ? -(int64_t)(bits & std::numeric_limits<I>::max()) : (int64_t)bits;
  };
  const int64_t largest = order(label);
  for (int64_t i = 0; i < count; ++i)
    if (order(i) > largest || (i < label && order(i) == largest)) return false;
  return true;
}

template <class S>
double value_of(const S& x) {
  return load_partial<typename RowPlan<S>::R>(&x, 1)[0];
}

// Returns whether the label is the argmax. `label_x` is the label's logit - max.
template <class S>
bool is_label_argmax(const S* row, int64_t label, int64_t classes, double label_x, double max) {
  using R = typename RowPlan<S>::R;
  if (label_x != 0) return false;
  const bool is_subnormal = std::fabs(max) < (double)std::numeric_limits<R>::min();
  return is_subnormal ? is_argmax_by_bits(row, label, classes) : is_first<R>(row, label, max);
}

// ---- conversion of a row between a storage type and the compute type ----------------------------

template <class F>
void with_storage_type(Storage storage, F f) {
  switch (storage) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kFloat16: return f(Half{});
    case kBfloat16: return f(Bfloat{});
  }
}

// Reads `count` values from index `first` on. `to` has room for whole vectors.
template <class R>
void widen(Storage storage, const void* from, int64_t first, int64_t count, R* to) {
  with_storage_type(storage, [=](auto type) {
    const auto* row = (const decltype(type)*)from + first;
    for (int64_t i = 0; i < count; i += lanes<R>) {
      const auto v = load_at<R>(row, i, count);
      memcpy(to + i, &v, sizeof v);
    }
  });
}

template <class R>
void narrow(Storage storage, const R* from, int64_t count, void* to, int64_t first) {
  with_storage_type(storage, [=](auto type) {
    auto* row = (decltype(type)*)to + first;
    for (int64_t i = 0; i < count; i += lanes<R>) {
      const auto v = loaded<Vec<R, lanes<R>>>(from + i);
      if (i + lanes<R> <= count) store<R>(row + i, v);
      else store_partial<R>(row + i, v, count - i);
    }
  });
}

// ---- targets ------------------------------------------------------------------------------------

// Writes a row's target probabilities, smoothed, to `q`. Returns the argmax.
template <class R>
int64_t read_probabilities(const Call& call, int64_t row, R* q) {
  widen<R>(call.target_storage, call.target, row * call.classes, call.classes, q);
  int64_t argmax = 0;
  for (int64_t i = 1; i < call.classes; ++i)
    if (q[i] > q[argmax]) argmax = i;
  if (const double smooth = call.options.label_smoothing; smooth != 0)
    for (int64_t i = 0; i < call.classes; ++i)
      q[i] = q[i] * (R)(1 - smooth) + (R)(smooth / call.classes);
  return argmax;
}

// Adds up x for label smoothing, and q and q x for target probabilities q.
template <class S>
NOINLINE void target_sums(const RowPlan<S>& plan, const S* row, int slot, NetworkSums& sums) {
  using R = typename RowPlan<S>::R;
  using V = typename RowPlan<S>::V;
  constexpr int64_t W = RowPlan<S>::W;
  const R max = sums.max[slot];
  const R* const q = plan.probabilities(slot);
  const int64_t classes = plan.classes;
  for (int64_t block = 0; block < classes; block += kBlockVectors * W) {
    V sum_x{}, sum_q_x{}, sum_q{};
    const int64_t end = block + kBlockVectors * W < classes ? block + kBlockVectors * W : classes;
    for (int64_t i = block; i < end; i += W) {
      V x = load_at<R>(row, i, classes) - max;
      if (i + W > classes) x = first_lanes<R>(classes - i) ? x : V{};
      sum_x += x;
      if (plan.has_probabilities) {
        const V q_i = loaded<V>(q + i);  // 0 past the last class
        sum_q += q_i;
        sum_q_x += q_i == 0 ? V{} : q_i * x;
      }
    }
    sums.x[slot] += lane_sum<R>(sum_x);
    sums.q_x[slot] += lane_sum<R>(sum_q_x);
    sums.q[slot] += lane_sum<R>(sum_q);
  }
}

}  // namespace
}  // namespace BDKD_ISA
