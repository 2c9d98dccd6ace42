// The mathematics of a row: from its sums to losses, statistics and the coefficients of the gradients.
//
// With x, e, e1 and g as in row_plan.h, tau the temperature, s the student and t the teacher:
//
//   Z = sum e    Z1 = sum e1    p = e / Z    ln(p_t / p_s) = g / tau - ln(Z_t / Z_s)
//
//   forward = KL(p_t || p_s) = sum(e_t g) / (tau Z_t) - ln(Z_t / Z_s)
//   reverse = KL(p_s || p_t) = ln(Z_t / Z_s) - sum(e_s g) / (tau Z_s)
//   H  = ln Z - sum(e x) / (tau Z)                        entropy; at temperature 1 of Z1, e1
//   ce = ln Z1 - x_label                                  cross entropy
//   d1 = gamma if H_t > H_s else 1,  d2 = gamma if H_s > H_t else 1
//
//   student_loss = student_kd tau^2 (d1 forward + d2 reverse)      + student_ce ce_s
//   teacher_loss = teacher_kd tau^2 (reverse, or forward by option) + teacher_ce ce_t
//
// and the gradients of the divergences with respect to the logits, class by class:
//
//   of forward: student (p_s - p_t) / tau,                  teacher p_t (ln(p_t / p_s) - forward) / tau
//   of reverse: student p_s (ln(p_s / p_t) - reverse) / tau, teacher (p_t - p_s) / tau
//
// Both divergences are computed from g of each class, and Z_t / Z_s from sum(e_t - e_s). If the
// distributions are similar, these values are small and keep their digits. The difference of two sums
// over the classes, such as two cross entropies, would round a small divergence away.
#pragma once
#include "row_plan.h"

namespace BDKD_ISA {
namespace {

// Rows slot .. slot + D of a group, one per lane of a vector of doubles. The lanes of ignored rows are
// arbitrary, and are written as 0.
template <class S>
class RowMath {
  static constexpr int D = lanes<double>;
  using Doubles = Vec<double, D>;
  using R = typename RowPlan<S>::R;

  struct NetworkTerms {
    Doubles inv_z1, log_z1, inv_z, log_z, ce{}, entropy{};
  };

  const RowPlan<S>& plan;
  const Options& options = plan.options;
  const Group& group;
  const int slot;
  const double tau = plan.temperature;
  Pair<NetworkTerms> terms;
  Doubles forward{}, reverse{}, log_z_ratio{}, d1{}, d2{};

 public:
  INLINE RowMath(const RowPlan<S>& plan, const Group& group, int slot) : plan(plan), group(group), slot(slot) {
    terms = both([&](const NetworkSums& sums) INLINE_LAMBDA {
      NetworkTerms of;
      of.inv_z = of.inv_z1 = 1 / lanes_of(sums.e1), of.log_z = of.log_z1 = log_of<Doubles>(lanes_of(sums.e1));
      return of;
    }, group);
    both([&](NetworkTerms& of, const NetworkSums& sums, bool has_ce) INLINE_LAMBDA {
      if (has_ce) of.ce = cross_entropy(sums, of.log_z1);
    }, terms, group, plan.has_ce);
    if (plan.any_kd) compute_divergences();
  }

  INLINE void write_coefficients(Pair<Coefficients<R>>& to) const {
    // A NaN of either network must reach every class, also classes whose e is 0. The sums are finite or
    // NaN, so 0 times their sum is 0 or NaN.
    const Doubles nan = plan.any_kd ? 0 * (lanes_of(group.student.e) + lanes_of(group.teacher.e)) : Doubles{};
    const Call& call = plan.call;
    const NetworkTerms &s = terms.student, &t = terms.teacher;
    if (call.student.gradient) {
      const Doubles scale = gradient_scale(group.student), kd = scale * options.student_kd * tau;
      put(to.student.e_g, -kd * d2 / tau * s.inv_z);
      put(to.student.e, kd * (d1 + d2 * (log_z_ratio - reverse)) * s.inv_z);
      put(to.student.other_e, kd * d1 * t.inv_z + nan);
      if (plan.has_ce.student) write_ce(to.student, scale * options.student_ce, s.inv_z1);
    }
    if (call.teacher.gradient) {
      const Doubles scale = gradient_scale(group.teacher), kd = scale * options.teacher_kd * tau, one = Doubles{} + 1;
      put(to.teacher.e_g, plan.teacher_forward ? kd / tau * t.inv_z : Doubles{});
      put(to.teacher.e, kd * (plan.teacher_forward ? -log_z_ratio - forward : one) * t.inv_z);
      put(to.teacher.other_e, (plan.teacher_forward ? Doubles{} : kd * s.inv_z) + nan);
      if (plan.has_ce.teacher) write_ce(to.teacher, scale * options.teacher_ce, t.inv_z1);
    }
  }

  // Writes the results of rows `row` .. row + count.
  INLINE void write_statistics(int64_t row, int count) const {
    const auto correct = [&](const NetworkSums& of) INLINE_LAMBDA {  // 0 for a row with a NaN
      const Doubles z1 = lanes_of(of.e1);
      return z1 == z1 ? lanes_of(of.is_correct) : Doubles{};
    };
    Doubles statistics[kStatistics];
    statistics[kForwardKl] = forward, statistics[kReverseKl] = reverse;
    statistics[kStudentEntropy] = terms.student.entropy, statistics[kTeacherEntropy] = terms.teacher.entropy;
    statistics[kStudentCe] = terms.student.ce, statistics[kTeacherCe] = terms.teacher.ce;
    statistics[kForwardWeight] = d1, statistics[kReverseWeight] = d2;
    statistics[kStudentConfidence] = terms.student.inv_z1, statistics[kTeacherConfidence] = terms.teacher.inv_z1;
    statistics[kStudentCorrect] = correct(group.student), statistics[kTeacherCorrect] = correct(group.teacher);
    for (int i = 0; i < kStatistics; ++i)
      write((R*)plan.call.statistics + i * plan.call.rows + row, count, statistics[i]);
  }

  INLINE void write_losses(int64_t row, int count) const {
    Doubles student{}, teacher{};
    if (plan.has_kd.student) student += options.student_kd * tau * tau * (d1 * forward + d2 * reverse);
    if (plan.has_kd.teacher) teacher += options.teacher_kd * tau * tau * (plan.teacher_forward ? forward : reverse);
    if (plan.has_ce.student) student += options.student_ce * terms.student.ce;
    if (plan.has_ce.teacher) teacher += options.teacher_ce * terms.teacher.ce;
    const Doubles weight = lanes_of(group.weight);
    write(plan.call.row_loss.student + row, count, weight * student);
    write(plan.call.row_loss.teacher + row, count, weight * teacher);
  }

 private:
  INLINE Doubles lanes_of(const Slots& slots) const { return loaded<Doubles>(slots + slot); }

  INLINE Doubles gradient_scale(const NetworkSums& sums) const {
    return lanes_of(group.weight) * plan.call.row_scale * lanes_of(sums.upstream);
  }

  INLINE Doubles cross_entropy(const NetworkSums& sums, Doubles log_z1) const {
    if (plan.has_probabilities) return lanes_of(group.target_sum) * log_z1 - lanes_of(sums.q_x);
    const Doubles loss = log_z1 - lanes_of(sums.label_x);
    if (!plan.smooths_labels) return loss;
    // With a smoothing of 1, the label's term is 0, even if the class of the label is masked.
    const double smoothing = options.label_smoothing;
    const Doubles label = smoothing < 1 ? (1 - smoothing) * loss : Doubles{};
    return label + smoothing * (log_z1 - lanes_of(sums.x) / (double)plan.classes);
  }

  INLINE void compute_divergences() {
    if (plan.version != 1)
      both([&](NetworkTerms& of, const NetworkSums& sums) INLINE_LAMBDA {
        of.inv_z = 1 / lanes_of(sums.e), of.log_z = log_of<Doubles>(lanes_of(sums.e));
      }, terms, group);
    NetworkTerms &s = terms.student, &t = terms.teacher;
    // For similar distributions, the relative rounding error of each sum (1e-7) would be larger than
    // the divergence.
    const Doubles change = lanes_of(group.e_difference) * s.inv_z;
    log_z_ratio = (change < 0.25) & (change > -0.25) ? log1p_near_0<Doubles>(change) : t.log_z - s.log_z;
    both([&](NetworkTerms& of, const NetworkSums& sums) INLINE_LAMBDA {
      if (plan.entropy_at_1) of.entropy = of.log_z1 - lanes_of(sums.e1_x) * of.inv_z1;
      else of.entropy = of.log_z - lanes_of(sums.e_x) * of.inv_z / tau;
    }, terms, group);
    const Doubles one = Doubles{} + 1, gamma = Doubles{} + options.gamma;
    d1 = t.entropy > s.entropy ? gamma : one, d2 = s.entropy > t.entropy ? gamma : one;
    forward = lanes_of(group.teacher.e_g) * t.inv_z / tau - log_z_ratio;
    reverse = log_z_ratio - lanes_of(group.student.e_g) * s.inv_z / tau;
  }

  INLINE void write_ce(Coefficients<R>& to, Doubles scale, Doubles inv_z1) const {
    const double smoothing = options.label_smoothing;
    put(to.e1, scale * lanes_of(group.target_sum) * inv_z1);
    put(to.target, scale * (plan.has_labels ? 1 - smoothing : 1));
    put(to.uniform, scale * (smoothing / plan.classes));
  }

  INLINE void put(R* slots, Doubles value) const {
    const auto converted = __builtin_convertvector(value, Vec<R, D>);
    memcpy((void*)(slots + slot), &converted, sizeof converted);
  }

  template <class T>
  INLINE void write(T* to, int count, Doubles value) const {
    const auto converted = __builtin_convertvector(lanes_of(group.is_counted) != 0 ? value : Doubles{}, Vec<T, D>);
    if (count >= D) memcpy((void*)to, &converted, sizeof converted);
    else memcpy((void*)to, &converted, sizeof(T) * count);
  }
};

// Writes the results of the group's `count` rows, the first of which is `row`, and the coefficients.
template <class S>
NOINLINE void scalars(RowState<S>& state, const Group& group, int64_t row, int count) {
  const RowPlan<S>& plan = state.plan;
  for (int slot = 0; slot < count; slot += lanes<double>) {
    const RowMath<S> math(plan, group, slot);
    math.write_coefficients(state.coefficients);
    if (plan.call.statistics) math.write_statistics(row + slot, count - slot);
    if (plan.call.row_loss.student) math.write_losses(row + slot, count - slot);
  }
}

}  // namespace
}  // namespace BDKD_ISA
