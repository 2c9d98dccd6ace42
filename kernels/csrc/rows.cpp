// The loss of one row: a pass for the maxima, one for the sums at both temperatures, one for the
// gradients and the divergences. Compiled once per instruction set.
//
// Notation: a = (logit - max) log2(e) / tau, so that e = 2^a = exp((logit - max) / tau); p = e / Z;
// d = log2(p_t / p_s). Divergences are summed as p_t ln(p_t / p_s) + p_s - p_t, whose terms are
// >= 0: nearly equal distributions lose nothing to cancellation.
#include <memory>

#include "call.h"
#include "simd.h"

namespace BDKD_ISA {
namespace {

constexpr double kLn2 = 0.693147180559945309, kLog2E = 1.44269504088896341;
constexpr int64_t kKeptBytes = 768 << 10;  // exponentials of one row pair that are kept, not redone
constexpr int kBlock = 64;  // vectors summed in the compute type before float64 takes them over

enum Stat { kForwardKL, kReverseKL, kStudentEntropy, kTeacherEntropy, kStudentCE, kTeacherCE,
            kForwardWeight, kReverseWeight, kStudentConfidence, kTeacherConfidence,
            kStudentCorrect, kTeacherCorrect, kStats };

struct NetworkSums {  // over one row, of one network
  double max = 0;
  double z = 0, z1 = 0;          // of e at tau, at 1
  double az = 0, xz1 = 0;        // of a e; of (logit - max) e at 1
  double cross = 0;              // of e (a - the partner's a)
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
  Mask<R> mask;
  for (int k = 0; k < lanes<R>; ++k) mask[k] = k < n ? -1 : 0;
  return mask;
}

template <class R, class S>
double row_max(const S* row, int64_t count) {
  constexpr int W = lanes<R>;
  using V = Vec<R, W>;
  R m = -INFINITY;
  int64_t i = 0;
  if (count >= W) {
    V a = V{} - (R)INFINITY, b = a;
    for (; i + 2 * W <= count; i += 2 * W) {
      a = larger<V>(a, load<R>(row + i));
      b = larger<V>(b, load<R>(row + i + W));
    }
    if (i + W <= count) a = larger<V>(a, load<R>(row + i));
    a = larger<V>(larger<V>(a, b), load<R>(row + count - W));
    return lane_max<R>(a);
  }
  V some = load_some<R>(row, count);
  for (int k = 0; k < count; ++k) m = m > some[k] || m != m ? m : some[k];
  return m;
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
  const bool kept = 3 * padded * (int64_t)sizeof(R) <= kKeptBytes;
  R* const q = scratch<R>((kept ? 4 : 1) * padded);   // the soft label, smoothed
  R* const es = q + padded;                           // likewise only where kept
  R* const et = es + padded;
  R* const gap = et + padded;                         // a_t - a_s

  INLINE V at_one(V e, V x) const {  // the exponential at temperature 1
    if (squarings < 0) return exp2_of<R>(x * (R)kLog2E);
    for (int k = 0; k < squarings; ++k) e *= e;
    return e;
  }

  template <bool careful>
  void sums(const S* s, const S* t, NetworkSums& student, NetworkSums& teacher) const {
    const R max_s = student.max, max_t = teacher.max;
    const bool student_cross = kd && call.student.gradient && o.student_kd != 0;
    const bool teacher_cross = kd && call.teacher.gradient && o.teacher_kd != 0 && o.teacher_forward;
    for (int64_t block = 0; block < C; block += kBlock * W) {
      V zs{}, zt{}, z1s{}, z1t{}, azs{}, azt{}, cs{}, ct{}, xz1s{}, xz1t{}, sum_s{}, sum_t{}, qs{},
          qt{}, q_sum{};
      const int64_t end = block + kBlock * W < C ? block + kBlock * W : C;
      for (int64_t i = block; i < end; i += W) {
        V xs = load_at<R>(s, i, C) - max_s, xt = load_at<R>(t, i, C) - max_t;
        V as = xs * to_log2, at = xt * to_log2;
        V e_s = exp2_of<R>(as), e_t = exp2_of<R>(at);
        const bool partial = i + W > C;
        const Mask<R> real = partial ? first_lanes<R>(C - i) : Mask<R>{};
        if (partial) {
          e_s = real ? e_s : V{}, e_t = real ? e_t : V{};
          as = real ? as : V{}, at = real ? at : V{};
          xs = real ? xs : V{}, xt = real ? xt : V{};
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
          azs += careful ? (e_s == 0 ? V{} : e_s * as) : e_s * as;
          azt += careful ? (e_t == 0 ? V{} : e_t * at) : e_t * at;
          if (student_cross) cs -= careful ? (e_s == 0 ? V{} : e_s * g) : e_s * g;
          if (teacher_cross) ct += careful ? (e_t == 0 ? V{} : e_t * g) : e_t * g;
        }
        if (squarings != 0) {
          V e1s = at_one(e_s, xs), e1t = at_one(e_t, xt);
          if (partial && squarings < 0) e1s = real ? e1s : V{}, e1t = real ? e1t : V{};
          z1s += e1s;
          z1t += e1t;
          if (plain_entropy) {
            xz1s += careful ? (e1s == 0 ? V{} : e1s * xs) : e1s * xs;
            xz1t += careful ? (e1t == 0 ? V{} : e1t * xt) : e1t * xt;
          }
        }
        if (smooth) sum_s += xs, sum_t += xt;
        if (soft) {
          V weight = loaded<V>(q + i);
          if (partial) weight = real ? weight : V{};
          q_sum += weight;
          qs += weight == 0 ? V{} : weight * xs;
          qt += weight == 0 ? V{} : weight * xt;
        }
      }
      student.z += lane_sum<R>(zs), teacher.z += lane_sum<R>(zt);
      if (kd) {
        student.az += lane_sum<R>(azs), teacher.az += lane_sum<R>(azt);
        if (student_cross) student.cross += lane_sum<R>(cs);
        if (teacher_cross) teacher.cross += lane_sum<R>(ct);
      }
      if (squarings != 0) {
        student.z1 += lane_sum<R>(z1s), teacher.z1 += lane_sum<R>(z1t);
        if (plain_entropy) student.xz1 += lane_sum<R>(xz1s), teacher.xz1 += lane_sum<R>(xz1t);
      }
      if (smooth) student.x += lane_sum<R>(sum_s), teacher.x += lane_sum<R>(sum_t);
      if (soft) {
        student.qx += lane_sum<R>(qs), teacher.qx += lane_sum<R>(qt);
        student.q += lane_sum<R>(q_sum);
      }
    }
    if (squarings == 0) {
      student.z1 = student.z, teacher.z1 = teacher.z;
      student.xz1 = student.az * kLn2, teacher.xz1 = teacher.az * kLn2;
    }
  }

  struct Coefficients {  // of one row's gradients; those of absent terms are not read
    R inverse_zs, inverse_zt, log2_zt_over_zs;
    R forward, reverse, reverse_kl;      // student: forward (p_s - p_t) + p_s (reverse d + reverse_kl)
    R gap, gap_kl;                       // teacher, forward: p_t (gap d + gap_kl)
    R student_ce, teacher_ce;            // of e at temperature 1
    R student_label, teacher_label;      // of q
    R student_uniform, teacher_uniform;  // of every class (label smoothing)
  };
  struct Divergences { double forward = 0, reverse = 0, mass = 0; };

  template <bool careful>
  void finish(const S* s, const S* t, S* ds, S* dt, int64_t label, double max_s_, double max_t_,
              const Coefficients& k, Divergences& total) const {
    const R max_s = max_s_, max_t = max_t_;
    const int64_t label_vector = labels ? label / W * W : -1;
    const bool student_kd = o.student_kd != 0, teacher_kd = o.teacher_kd != 0;
    for (int64_t block = 0; block < C; block += kBlock * W) {
      V forward{}, reverse{}, mass{};
      const int64_t end = block + kBlock * W < C ? block + kBlock * W : C;
      for (int64_t i = block; i < end; i += W) {
        V e_s, e_t, g, xs{}, xt{};
        const bool partial = i + W > C;
        if (!kept || squarings < 0) {
          xs = load_at<R>(s, i, C) - max_s, xt = load_at<R>(t, i, C) - max_t;
        }
        if (kept) {
          e_s = loaded<V>(es + i), e_t = loaded<V>(et + i), g = loaded<V>(gap + i);
        } else {
          V as = xs * to_log2, at = xt * to_log2;
          e_s = exp2_of<R>(as), e_t = exp2_of<R>(at);
          g = at - as;
          if (partial) {
            auto real = first_lanes<R>(C - i);
            e_s = real ? e_s : V{}, e_t = real ? e_t : V{}, g = real ? g : V{};
          }
        }
        V p_s{}, p_t{}, difference{}, d{};
        if (kd) {
          p_s = e_s * k.inverse_zs, p_t = e_t * k.inverse_zt;
          difference = p_s - p_t, d = g - k.log2_zt_over_zs;
          forward += careful ? (p_t == 0 ? V{} : p_t * d) : p_t * d;
          reverse += careful ? (p_s == 0 ? V{} : p_s * d) : p_s * d;
          mass += difference;
        }
        if (ds) {
          V gradient{};
          if (student_kd) {
            V pull = p_s * (d * k.reverse + k.reverse_kl);
            gradient = difference * k.forward + (careful ? (p_s == 0 ? V{} : pull) : pull);
          }
          if (student_ce) {
            gradient += at_one(e_s, xs) * k.student_ce;
            if (smooth) gradient -= k.student_uniform;
            if (soft) gradient -= loaded<V>(q + i) * k.student_label;
            if (i == label_vector) gradient[label - i] -= k.student_label;
          }
          put(ds, i, gradient, partial);
        }
        if (dt) {
          V gradient{};
          if (teacher_kd) {
            if (o.teacher_forward) {
              V pull = p_t * (d * k.gap + k.gap_kl);
              gradient = careful ? (p_t == 0 ? V{} : pull) : pull;
            } else {
              gradient = difference * k.gap;
            }
          }
          if (teacher_ce) {
            gradient += at_one(e_t, xt) * k.teacher_ce;
            if (smooth) gradient -= k.teacher_uniform;
            if (soft) gradient -= loaded<V>(q + i) * k.teacher_label;
            if (i == label_vector) gradient[label - i] -= k.teacher_label;
          }
          put(dt, i, gradient, partial);
        }
      }
      total.forward += lane_sum<R>(forward);
      total.reverse += lane_sum<R>(reverse);
      total.mass += lane_sum<R>(mass);
    }
  }

  template <class G>
  INLINE void put(G* row, int64_t i, V gradient, bool partial) const {
    if (partial) {
      store_some<R>(row + i, gradient, C - i);
    } else if (call.streaming && (uintptr_t)(row + i) % (W * sizeof(G)) == 0) {
      store_past_the_cache<R>(row + i, gradient);
    } else {
      store<R>(row + i, gradient);
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

    const NetworkSums max_s = student, max_t = teacher;
    sums<false>(s, t, student, teacher);
    // A class masked by -inf, or inf or NaN, shows as a NaN here: 0 * inf needs the careful path.
    const bool careful = kd && !std::isfinite(student.az + teacher.az + student.cross + teacher.cross +
                                              student.xz1 + teacher.xz1);
    if (careful) {
      student = max_s, teacher = max_t;
      sums<true>(s, t, student, teacher);
    }

    const double q_sum = soft ? student.q : 1;
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

    double entropy_s = 0, entropy_t = 0, d1 = 0, d2 = 0, reverse_kl = 0, forward_kl = 0;
    double log2_zt_over_zs = 0;
    if (kd) {
      const double log_zs = squarings == 0 ? log_z1s : std::log(student.z);
      const double log_zt = squarings == 0 ? log_z1t : std::log(teacher.z);
      log2_zt_over_zs = (log_zt - log_zs) * kLog2E;
      if (plain_entropy) {
        entropy_s = log_z1s - student.xz1 / student.z1, entropy_t = log_z1t - teacher.xz1 / teacher.z1;
      } else {
        entropy_s = log_zs - kLn2 * student.az / student.z;
        entropy_t = log_zt - kLn2 * teacher.az / teacher.z;
      }
      d1 = entropy_t > entropy_s ? o.gamma : 1, d2 = entropy_s > entropy_t ? o.gamma : 1;
      // Good enough for gradients, whose other terms are of the size of what cancels here.
      reverse_kl = kLn2 * student.cross / student.z + log_zt - log_zs;
      forward_kl = kLn2 * teacher.cross / teacher.z + log_zs - log_zt;
    }

    const double weight = call.weight ? (double)((const R*)call.weight)[row] : 1;
    Coefficients k{};
    k.inverse_zs = 1 / student.z, k.inverse_zt = 1 / teacher.z;
    k.log2_zt_over_zs = log2_zt_over_zs;
    if (ds) {
      const double scale = weight * call.per_row * upstream(call.student, row);
      const double kd_scale = scale * o.student_kd * tau, ce_scale = scale * o.student_ce;
      k.forward = kd_scale * d1;
      k.reverse = -kd_scale * d2 * kLn2, k.reverse_kl = -kd_scale * d2 * reverse_kl;
      k.student_ce = (no_such_label ? NAN : ce_scale) * q_sum / student.z1;
      k.student_label = ce_scale * (labels ? 1 - smoothing : 1);
      k.student_uniform = ce_scale * smoothing / C;
    }
    if (dt) {
      const double scale = weight * call.per_row * upstream(call.teacher, row);
      const double kd_scale = scale * o.teacher_kd * tau, ce_scale = scale * o.teacher_ce;
      k.gap = o.teacher_forward ? kd_scale * kLn2 : -kd_scale, k.gap_kl = -kd_scale * forward_kl;
      k.teacher_ce = (no_such_label ? NAN : ce_scale) * q_sum / teacher.z1;
      k.teacher_label = ce_scale * (labels ? 1 - smoothing : 1);
      k.teacher_uniform = ce_scale * smoothing / C;
    }
    Divergences sum;
    if (kd || ds || dt)
      (careful ? finish<true>(s, t, ds, dt, label, student.max, teacher.max, k, sum)
               : finish<false>(s, t, ds, dt, label, student.max, teacher.max, k, sum));
    const double forward = kLn2 * sum.forward + sum.mass, reverse = -kLn2 * sum.reverse - sum.mass;

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

  static double value(float x) { return x; }
  static double value(double x) { return x; }
  template <class H>
  static double value(H x) {
    return load_some<R>(&x, 1)[0];
  }
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
