// The loss of one row: a pass for the maxima, one for the sums at both temperatures, one for the
// gradients and the divergences. Compiled once per instruction set.
//
// Notation: a = (logit - max) log2(e) / tau, so that e = 2^a = exp((logit - max) / tau); Z = sum e;
// p = e / Z. KL(p_t || p_s) = ln 2 (sum p_t (a_t - a_s) - log2(Z_t / Z_s)): of differences class by
// class, which are small where the distributions are near, and of Z_t / Z_s from sum (e_t - e_s). A
// difference of two sums over classes, as from E[u] and E[v], would lose such a divergence.
#include <memory>

#include "call.h"
#include "simd.h"

namespace BDKD_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309, kLog2E = 1.44269504088896341;
constexpr int64_t kKeptBytes = 160 << 10;  // exponentials of one row pair that are kept, not redone
constexpr int kBlock = 64;  // vectors summed in the compute type before float64 takes them over

enum Stat { kForwardKL, kReverseKL, kStudentEntropy, kTeacherEntropy, kStudentCE, kTeacherCE,
            kForwardWeight, kReverseWeight, kStudentConfidence, kTeacherConfidence,
            kStudentCorrect, kTeacherCorrect, kStats };

struct NetworkSums {  // over one row, of one network
  double max = 0;
  double z = 0, z1 = 0;          // of e at tau, at 1
  double az = 0, xz1 = 0;        // of a e; of (logit - max) e at 1
  double gap = 0;                // of e (a_t - a_s)
  double z_gap = 0;              // teacher's: of e_t - e_s
  double x = 0, qx = 0, q = 0;   // of logit - max; of q (logit - max); of q
};

template <class R>
struct AlignedDelete {
  void operator()(R* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

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

template <class R, class S>
INLINE Vec<R, lanes<R>> load_at(const S* row, int64_t i, int64_t count) {
  return i + lanes<R> <= count ? load<R>(row + i) : load_some<R>(row + i, count - i);
}

template <class R>
using Mask = Vec<std::conditional_t<sizeof(R) == 4, int32_t, int64_t>, lanes<R>>;

template <class R>
INLINE Mask<R> first_lanes(int64_t n) {  // all ones in lanes < n
  using I = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  static constexpr struct { I ones[lanes<R>], zeros[lanes<R>]; } kMask = [] {
    std::remove_const_t<decltype(kMask)> mask{};
    for (I& one : mask.ones) one = -1;
    return mask;
  }();
  return loaded<Mask<R>>(kMask.zeros - n);
}

// Of a row with a NaN, anything: the row's sums are NaN whatever is subtracted.
template <class R, class S>
INLINE double row_max(const S* row, int64_t count) {
  constexpr int W = lanes<R>;
  using V = Vec<R, W>;
  V a = V{} - (R)INFINITY, b = a;
  int64_t i = 0;
  for (; i + 2 * W <= count; i += 2 * W) {
    a = larger<V>(a, load<R>(row + i));
    b = larger<V>(b, load<R>(row + i + W));
  }
  if (i + W <= count) a = larger<V>(a, load<R>(row + i)), i += W;
  if (i < count) {
    const V some = load_some<R>(row + i, count - i);
    b = first_lanes<R>(count - i) ? larger<V>(b, some) : b;
  }
  return lane_max(larger<V>(a, b));
}

// Whether no logit before `label` is as large: ties go to the first class.
template <class R, class S>
bool is_first(const S* row, int64_t label, double max) {
  constexpr int W = lanes<R>;
  Mask<R> equal{};
  int64_t i = 0;
  for (; i + W <= label; i += W) equal |= load<R>(row + i) == (Vec<R, W>{} + (R)max);
  if (i < label)
    equal |= (load_some<R>(row + i, label - i) == (Vec<R, W>{} + (R)max)) & first_lanes<R>(label - i);
  return !any(equal);
}

// A row of a storage type as the compute type; `to` is padded to whole vectors.
template <class R, class S>
void widen_as(const void* from, int64_t count, R* to) {
  for (int64_t i = 0; i < count; i += lanes<R>) {
    auto v = load_at<R>((const S*)from, i, count);
    memcpy(to + i, &v, sizeof v);
  }
}
template <class R>
void widen(int32_t storage, const void* rows, int64_t first, int64_t count, R* to) {
  switch (storage) {
    case kFloat32: return widen_as<R, float>((const float*)rows + first, count, to);
    case kFloat64: return widen_as<R, double>((const double*)rows + first, count, to);
    case kFloat16: return widen_as<R, Half>((const Half*)rows + first, count, to);
    default: return widen_as<R, BFloat>((const BFloat*)rows + first, count, to);
  }
}

template <class R, class S>
void narrow_as(const R* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; i += lanes<R>) {
    auto v = loaded<Vec<R, lanes<R>>>(from + i);
    if (i + lanes<R> <= count) store<R>((S*)to + i, v);
    else store_some<R>((S*)to + i, v, count - i);
  }
}
template <class R>
void narrow(int32_t storage, const R* from, int64_t count, void* rows, int64_t first) {
  switch (storage) {
    case kFloat32: return narrow_as<R, float>(from, count, (float*)rows + first);
    case kFloat64: return narrow_as<R, double>(from, count, (double*)rows + first);
    case kFloat16: return narrow_as<R, Half>(from, count, (Half*)rows + first);
    default: return narrow_as<R, BFloat>(from, count, (BFloat*)rows + first);
  }
}

template <class R>
int64_t soft_row(const Call& call, int64_t row, R* q) {  // the row, smoothed; its first largest class
  widen<R>(call.target_kind, call.target, row * call.classes, call.classes, q);
  int64_t first = 0;
  for (int64_t i = 1; i < call.classes; ++i)
    if (q[i] > q[first]) first = i;
  if (const double smooth = call.options.label_smoothing; smooth != 0)
    for (int64_t i = 0; i < call.classes; ++i)
      q[i] = q[i] * (R)(1 - smooth) + (R)(smooth / call.classes);
  return first;
}

template <class S>
struct Rows {
  using R = std::conditional_t<std::is_same_v<S, double>, double, float>;
  static constexpr int W = lanes<R>;
  using V = Vec<R, W>;

  const Call& call;
  const Options& o = call.options;
  const int64_t C = call.classes;
  const int64_t padded = (C + W - 1) / W * W;
  const bool kd = o.student_kd != 0 || o.teacher_kd != 0;
  const bool labels = call.target_kind == kLabels, soft = call.target_kind >= 0;
  const bool student_ce = o.student_ce != 0 && call.target_kind != kNoTarget;
  const bool teacher_ce = o.teacher_ce != 0 && call.target_kind != kNoTarget;
  const bool smooth = labels && o.label_smoothing != 0 && (student_ce || teacher_ce);
  const bool plain_entropy = kd && !o.soften_entropy;
  const double tau = kd ? o.temperature : 1.0;
  const R to_log2 = kLog2E / tau;
  // exp(x) = exp(x / tau)^tau: for tau of 1, 2, 4, 8 by squaring; -1: another exponential.
  const int squarings = tau == 1 ? 0 : tau == 2 ? 1 : tau == 4 ? 2 : tau == 8 ? 3 : -1;
  const bool kept = 5 * padded * (int64_t)sizeof(R) <= kKeptBytes;
  R* const q = scratch<R>((kept ? 6 : 1) * padded);  // (C,) the soft label, smoothed
  // Of one row, where they are kept: e at tau and at 1, and a_t - a_s. Each (C,), padded with 0.
  R* const es = q + padded;
  R* const et = es + padded;
  R* const gap = et + padded;
  R* const e1s = squarings == 0 ? es : gap + padded;
  R* const e1t = squarings == 0 ? et : e1s + padded;

  // The exponential at temperature 1, by squaring or anew.
  static INLINE V at_one(V e, V x, int squarings) {
    if (squarings < 0) return exp2_of<R>(x * (R)kLog2E);
    if (squarings > 0) e *= e;
    if (squarings > 1) e *= e;
    if (squarings > 2) e *= e;
    return e;
  }

  // What rows rarely need has loops of its own, or `rare`, so that the common loop's sums stay in
  // registers; branches on the options inside it are predicted and cost nothing that was measured.
  template <bool rare>
  NOINLINE void sums(const S* s, const S* t, const S* ds, const S* dt, bool careful, NetworkSums& student,
                     NetworkSums& teacher) const {
    const R max_s = student.max, max_t = teacher.max, to_log2 = this->to_log2;
    const int64_t C = this->C;
    const int squarings = this->squarings;
    const bool kd = !rare || this->kd, kept = this->kept, plain_entropy = this->plain_entropy;
    R *const es = this->es, *const et = this->et, *const gap = this->gap;
    R *const e1s = this->e1s, *const e1t = this->e1t;
    const S *const next_s = s + call.student.stride, *const next_t = t + call.teacher.stride;
    const bool fetch = !call.streaming;
    for (int64_t block = 0; block < C; block += kBlock * W) {
      V zs{}, zt{}, zg{}, z1s{}, z1t{}, azs{}, azt{}, gs{}, gt{}, xz1s{}, xz1t{};
      const int64_t end = block + kBlock * W < C ? block + kBlock * W : C;
      for (int64_t i = block; i < end; i += W) {
        V xs = load_at<R>(s, i, C) - max_s, xt = load_at<R>(t, i, C) - max_t;
        V as = xs * to_log2, at = xt * to_log2;
        V e_s = exp2_of<R>(as), e_t = exp2_of<R>(at);
        const bool partial = i + W > C;
        if (fetch) {  // this loop waits for arithmetic, its neighbours for memory
          __builtin_prefetch(next_s + i);
          __builtin_prefetch(next_t + i);
          if (ds) __builtin_prefetch(ds + i, 1);
          if (dt) __builtin_prefetch(dt + i, 1);
        }
        if (partial) {
          const Mask<R> real = first_lanes<R>(C - i);
          e_s = real ? e_s : V{}, e_t = real ? e_t : V{};
          as = real ? as : V{}, at = real ? at : V{};
          xs = real ? xs : V{} - (R)INFINITY, xt = real ? xt : V{} - (R)INFINITY;
        }
        V g = at - as;
        if (kept) {
          memcpy(es + i, &e_s, sizeof e_s);
          memcpy(et + i, &e_t, sizeof e_t);
          memcpy(gap + i, &g, sizeof g);
        }
        zs += e_s;
        zt += e_t;
        if (kd) {
          zg += e_t - e_s;
          azs += rare && careful ? (e_s == 0 ? V{} : e_s * as) : e_s * as;
          azt += rare && careful ? (e_t == 0 ? V{} : e_t * at) : e_t * at;
          gs += rare && careful ? (e_s == 0 ? V{} : e_s * g) : e_s * g;
          gt += rare && careful ? (e_t == 0 ? V{} : e_t * g) : e_t * g;
        }
        if (squarings != 0) {
          const V e1_s = at_one(e_s, xs, squarings), e1_t = at_one(e_t, xt, squarings);
          if (kept) {
            memcpy(e1s + i, &e1_s, sizeof e1_s);
            memcpy(e1t + i, &e1_t, sizeof e1_t);
          }
          z1s += e1_s;
          z1t += e1_t;
          if (rare && plain_entropy) {
            xz1s += careful || partial ? (e1_s == 0 ? V{} : e1_s * xs) : e1_s * xs;
            xz1t += careful || partial ? (e1_t == 0 ? V{} : e1_t * xt) : e1_t * xt;
          }
        }
      }
      student.z += lane_sum<R>(zs), teacher.z += lane_sum<R>(zt);
      if (kd) {
        student.az += lane_sum<R>(azs), teacher.az += lane_sum<R>(azt);
        student.gap += lane_sum<R>(gs), teacher.gap += lane_sum<R>(gt);
        teacher.z_gap += lane_sum<R>(zg);
      }
      if (squarings != 0) {
        student.z1 += lane_sum<R>(z1s), teacher.z1 += lane_sum<R>(z1t);
        if (rare) student.xz1 += lane_sum<R>(xz1s), teacher.xz1 += lane_sum<R>(xz1t);
      }
    }
    if (squarings == 0) {
      student.z1 = student.z, teacher.z1 = teacher.z;
      student.xz1 = student.az * kLn2, teacher.xz1 = teacher.az * kLn2;
    }
  }

  // Label smoothing's sum of logit - max, or a soft label's sums of q and of q (logit - max).
  NOINLINE void target_sums(const S* s, NetworkSums& network) const {
    const R max = network.max;
    for (int64_t block = 0; block < C; block += kBlock * W) {
      V sum_x{}, sum_qx{}, sum_q{};
      const int64_t end = block + kBlock * W < C ? block + kBlock * W : C;
      for (int64_t i = block; i < end; i += W) {
        V x = load_at<R>(s, i, C) - max;
        if (i + W > C) x = first_lanes<R>(C - i) ? x : V{};
        sum_x += x;
        if (soft) {
          const V weight = loaded<V>(q + i);  // 0 past the last class
          sum_q += weight;
          sum_qx += weight == 0 ? V{} : weight * x;
        }
      }
      network.x += lane_sum<R>(sum_x), network.qx += lane_sum<R>(sum_qx), network.q += lane_sum<R>(sum_q);
    }
  }

  // One row's gradients: (e (gap + offset) - partner) over a row's exponentials and a_t - a_s, which
  // is  forward (p_s - p_t) + reverse p_s (ln(p_s / p_t) - R)  and its like with the sums put in.
  struct Coefficients {
    R gap = 0, offset = 0;  // of e (a_t - a_s) and of e
    R partner = 0;          // of the partner's e
    R softmax = 0;          // of e at temperature 1
    R target = 0;           // of q
    R uniform = 0;          // of every class (label smoothing)
  };

  template <bool rare, bool kept>
  NOINLINE void gradients(const S* s, const S* t, S* ds, S* dt, int64_t label, bool careful, R max_s, R max_t,
                          const Coefficients& student, const Coefficients& teacher) const {
    struct {
      V gap, offset, partner, softmax, target, uniform;
    } ks, kt;
    const auto spread = [](auto& wide, const Coefficients& k) {
      wide = {V{} + k.gap,     V{} + k.offset, V{} + k.partner,
              V{} + k.softmax, V{} + k.target, V{} + k.uniform};
    };
    spread(ks, student), spread(kt, teacher);
    const int64_t C = this->C, label_vector = labels ? label / W * W : -1;
    const int squarings = this->squarings;
    const R to_log2 = this->to_log2;
    const R *const es = this->es, *const et = this->et, *const e1s = this->e1s, *const e1t = this->e1t;
    const R *const gap = this->gap, *const q = this->q;
    const bool soft = this->soft, spread_target = soft || smooth, forward = o.teacher_forward;
    const bool student_kd = !rare || o.student_kd != 0, teacher_kd = !rare || o.teacher_kd != 0;
    const bool student_ce = !rare || this->student_ce, teacher_ce = !rare || this->teacher_ce;
    const bool streaming = call.streaming;

    const auto toward_target = [&](V gradient, int64_t i, V e1, const auto& k) INLINE_LAMBDA {
      gradient += e1 * k.softmax;
      if (spread_target) gradient -= soft ? loaded<V>(q + i) * k.target : k.uniform;
      if (i == label_vector) {
        const Mask<R> it = first_lanes<R>(label - i + 1) & ~first_lanes<R>(label - i);
        gradient -= it ? k.target : V{};
      }
      return gradient;
    };
    const auto put = [&](S* row, int64_t i, V gradient) INLINE_LAMBDA {
      if (i + W > C) store_some<R>(row + i, gradient, C - i);
      else if (streaming) store_past_the_cache<R>(row + i, gradient);
      else store<R>(row + i, gradient);
    };
    for (int64_t i = 0; i < C; i += W) {
      V e_s, e_t, g, e1_s{}, e1_t{};
      if (kept) {
        e_s = loaded<V>(es + i), e_t = loaded<V>(et + i), g = loaded<V>(gap + i);
        e1_s = loaded<V>(e1s + i), e1_t = loaded<V>(e1t + i);
      } else {
        const V xs = load_at<R>(s, i, C) - max_s, xt = load_at<R>(t, i, C) - max_t;
        const V as = xs * to_log2, at = xt * to_log2;
        e_s = exp2_of<R>(as), e_t = exp2_of<R>(at);
        g = at - as;
        if (ds && student_ce) e1_s = at_one(e_s, xs, squarings);
        if (dt && teacher_ce) e1_t = at_one(e_t, xt, squarings);
      }
      if (ds) {
        V gradient{};
        if (student_kd) {
          gradient = e_s * (g * ks.gap + ks.offset);
          if (rare && careful) gradient = e_s == 0 ? V{} : gradient;
          gradient -= e_t * ks.partner;
        }
        if (student_ce) gradient = toward_target(gradient, i, e1_s, ks);
        put(ds, i, gradient);
      }
      if (dt) {
        V gradient{};
        if (rare && teacher_kd && forward) {
          gradient = e_t * (g * kt.gap + kt.offset);
          if (careful) gradient = e_t == 0 ? V{} : gradient;
        } else if (teacher_kd) {
          gradient = e_t * kt.offset - e_s * kt.partner;
        }
        if (teacher_ce) gradient = toward_target(gradient, i, e1_t, kt);
        put(dt, i, gradient);
      }
    }
  }

  void ignored(int64_t row, S* ds, S* dt) const {
    if (ds) memset((void*)ds, 0, C * sizeof(S));
    if (dt) memset((void*)dt, 0, C * sizeof(S));
    for (int stat = 0; call.stats && stat < kStats; ++stat) ((R*)call.stats)[stat * call.rows + row] = 0;
    if (call.student_loss) call.student_loss[row] = call.teacher_loss[row] = 0;
  }

  static double upstream(const Logits& logits, int64_t row) {
    return logits.upstream ? (double)((const R*)logits.upstream)[row] : logits.scale;
  }

  void operator()(int64_t row, const S* s, const S* t, S* ds, S* dt) const {
    int64_t label = labels ? ((const int64_t*)call.target)[row] : -1;
    if (labels && label == o.ignore_index) return ignored(row, ds, dt);
    const bool no_such_label = labels && (label < 0 || label >= C);
    if (no_such_label) label = 0;
    if (soft) label = soft_row<R>(call, row, q);

    NetworkSums student, teacher;
    student.max = row_max<R>(s, C), teacher.max = row_max<R>(t, C);
    const double label_s = label < 0 ? 0 : value(s[label]) - student.max;
    const double label_t = label < 0 ? 0 : value(t[label]) - teacher.max;
    const bool correct_s = label >= 0 && label_s == 0 && is_first<R>(s, label, student.max);
    const bool correct_t = label >= 0 && label_t == 0 && is_first<R>(t, label, teacher.max);

    const double max_s = student.max, max_t = teacher.max;
    if (kd && !plain_entropy) sums<false>(s, t, ds, dt, false, student, teacher);
    else sums<true>(s, t, ds, dt, false, student, teacher);
    // A class masked by -inf, or inf or NaN, shows as a NaN here: 0 * inf needs the careful path.
    const bool careful = kd && !std::isfinite(student.az + teacher.az + student.gap + teacher.gap +
                                              student.xz1 + teacher.xz1);
    if (careful) {
      student = teacher = {};
      student.max = max_s, teacher.max = max_t;
      sums<true>(s, t, ds, dt, true, student, teacher);
    }
    if (student_ce && (soft || smooth)) target_sums(s, student);
    if (teacher_ce && (soft || smooth)) target_sums(t, teacher);

    const double q_sum = soft ? (student_ce ? student.q : teacher.q) : 1;
    const double log_z1s = std::log(student.z1), log_z1t = std::log(teacher.z1);
    double ce_s = 0, ce_t = 0;
    const double smoothing = o.label_smoothing;
    auto cross_entropy = [&](const NetworkSums& sums, double label_x, double log_z1) {
      if (no_such_label) return (double)NAN;
      if (soft) return q_sum * log_z1 - sums.qx;
      double loss = log_z1 - label_x;
      return smooth ? (1 - smoothing) * loss + smoothing * (log_z1 - sums.x / C) : loss;
    };
    if (student_ce) ce_s = cross_entropy(student, label_s, log_z1s);
    if (teacher_ce) ce_t = cross_entropy(teacher, label_t, log_z1t);

    double entropy_s = 0, entropy_t = 0, d1 = 0, d2 = 0, forward = 0, reverse = 0, log2_zt_over_zs = 0;
    if (kd) {
      const double log_zs = squarings == 0 ? log_z1s : std::log(student.z);
      const double log_zt = squarings == 0 ? log_z1t : std::log(teacher.z);
      // Near distributions: the sums' own roundings, 1e-7 of each, would drown their divergence.
      const double change = teacher.z_gap / student.z;
      log2_zt_over_zs = (std::abs(change) < 0.5 ? std::log1p(change) : log_zt - log_zs) * kLog2E;
      if (plain_entropy) {
        entropy_s = log_z1s - student.xz1 / student.z1, entropy_t = log_z1t - teacher.xz1 / teacher.z1;
      } else {
        entropy_s = log_zs - kLn2 * student.az / student.z;
        entropy_t = log_zt - kLn2 * teacher.az / teacher.z;
      }
      d1 = entropy_t > entropy_s ? o.gamma : 1, d2 = entropy_s > entropy_t ? o.gamma : 1;
      forward = kLn2 * (teacher.gap / teacher.z - log2_zt_over_zs);
      reverse = kLn2 * (log2_zt_over_zs - student.gap / student.z);
    }

    const double weight = call.weight ? (double)((const R*)call.weight)[row] : 1;
    auto to_target = [&](Coefficients& k, double scale, double z1) {
      k.softmax = (no_such_label ? NAN : scale) * q_sum / z1;
      k.target = scale * (labels ? 1 - smoothing : 1);
      k.uniform = scale * smoothing / C;
    };
    Coefficients of_s, of_t;
    if (ds) {
      const double scale = weight * call.per_row * upstream(call.student, row);
      const double kd_scale = scale * o.student_kd * tau;
      of_s.gap = -kd_scale * d2 * kLn2 / student.z;
      of_s.offset = kd_scale * (d1 + d2 * (kLn2 * log2_zt_over_zs - reverse)) / student.z;
      of_s.partner = kd_scale * d1 / teacher.z;
      if (student_ce) to_target(of_s, scale * o.student_ce, student.z1);
    }
    if (dt) {
      const double scale = weight * call.per_row * upstream(call.teacher, row);
      const double kd_scale = scale * o.teacher_kd * tau;
      of_t.gap = kd_scale * kLn2 / teacher.z;
      of_t.offset =
          kd_scale * (o.teacher_forward ? -kLn2 * log2_zt_over_zs - forward : 1) / teacher.z;
      of_t.partner = kd_scale / student.z;
      if (teacher_ce) to_target(of_t, scale * o.teacher_ce, teacher.z1);
    }
    if (ds || dt) {
      // The common loops multiply an absent term by 0. The rare one leaves it out: of a row that
      // holds what is not finite, and where it would cost exponentials.
      const bool rare = careful || !kd || o.teacher_forward || (squarings < 0 && !(student_ce && teacher_ce));
      const auto run = rare ? (kept ? &Rows::gradients<true, true> : &Rows::gradients<true, false>)
                            : (kept ? &Rows::gradients<false, true> : &Rows::gradients<false, false>);
      (this->*run)(s, t, ds, dt, label, careful, max_s, max_t, of_s, of_t);
    }

    if (call.stats) {
      const double stats[kStats] = {
          forward, reverse, entropy_s, entropy_t, ce_s, ce_t, d1, d2, 1 / student.z1, 1 / teacher.z1,
          (double)(correct_s && student.z1 == student.z1), (double)(correct_t && teacher.z1 == teacher.z1)};
      for (int stat = 0; stat < kStats; ++stat) ((R*)call.stats)[stat * call.rows + row] = stats[stat];
    }
    if (call.student_loss) {
      double student_loss = 0, teacher_loss = 0;
      if (o.student_kd != 0) student_loss += o.student_kd * tau * tau * (d1 * forward + d2 * reverse);
      if (o.teacher_kd != 0) teacher_loss += o.teacher_kd * tau * tau * (o.teacher_forward ? forward : reverse);
      if (student_ce) student_loss += o.student_ce * ce_s;
      if (teacher_ce) teacher_loss += o.teacher_ce * ce_t;
      call.student_loss[row] = weight * student_loss;
      call.teacher_loss[row] = weight * teacher_loss;
    }
  }

  static double value(const S& x) { return load_some<R>(&x, 1)[0]; }
};

struct Subnormals {  // exponentials that small would cost 150 cycles each: on x86 they are 0 here
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  Subnormals() { _mm_setcsr(mode | 0x8040); }
  ~Subnormals() { _mm_sfence(), _mm_setcsr(mode); }
#endif
};

template <class S>
void run(const Call& call, int64_t begin, int64_t end) {
  const Subnormals are_zero;
  const Rows<S> one_row{call};
  const auto &s = call.student, &t = call.teacher;
  for (int64_t row = begin; row < end; ++row)
    one_row(row, (const S*)s.rows + row * s.stride, (const S*)t.rows + row * t.stride,
            s.gradient ? (S*)s.gradient + row * s.gradient_stride : nullptr,
            t.gradient ? (S*)t.gradient + row * t.gradient_stride : nullptr);
}

// Two storage types: each row goes through a copy in the compute type.
template <class R>
void run_mixed(const Call& mixed, int64_t begin, int64_t end) {
  const Subnormals are_zero;
  Call call = mixed;
  call.streaming = false;
  const Rows<R> one_row{call};
  const int64_t padded = one_row.padded;
  const std::unique_ptr<R[]> memory(new R[2 * padded]);
  R *const a = memory.get(), *const b = a + padded;
  const auto &s = call.student, &t = call.teacher;
  for (int64_t row = begin; row < end; ++row) {
    widen<R>(s.storage, s.rows, row * s.stride, call.classes, a);
    widen<R>(t.storage, t.rows, row * t.stride, call.classes, b);
    one_row(row, a, b, s.gradient ? a : nullptr, t.gradient ? b : nullptr);
    if (s.gradient) narrow<R>(s.storage, a, call.classes, s.gradient, row * s.gradient_stride);
    if (t.gradient) narrow<R>(t.storage, b, call.classes, t.gradient, row * t.gradient_stride);
  }
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {{run<float>, run<double>, run<Half>, run<BFloat>}, run_mixed<float>, run_mixed<double>};

}  // namespace BDKD_ISA
