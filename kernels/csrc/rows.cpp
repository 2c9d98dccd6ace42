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

// Rows whose scalars (logarithms, divergences, weights, coefficients) are worked out side by side,
// a lane each: for few classes they cost more than the classes do. No row's result depends on which
// others stand beside it.
constexpr int kGroup = 8;
constexpr int64_t kGroupBytes = 96 << 10;  // what is kept of a group's rows: it stays near

struct NetworkSums {  // over each row of a group, of one network
  using Each = double[kGroup];
  Each max{};
  Each z{}, z1{};         // of e at tau, at 1
  Each az{}, xz1{};       // of a e; of (logit - max) e at 1
  Each gap{};             // of e (a_t - a_s)
  Each z_gap{};           // teacher's: of e_t - e_s
  Each x{}, qx{}, q{};    // of logit - max; of q (logit - max); of q

  void clear(int k) {  // all but max
    z[k] = z1[k] = az[k] = xz1[k] = gap[k] = z_gap[k] = 0;
  }
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

// The largest of a 2-byte type without a conversion: as integers the bits of positive numbers are in
// order, those of negative ones in reverse, and any positive one is larger.
template <class R, class S>
NOINLINE double row_max_of_bits(const S* row, int64_t count) {  // of a vector's width or more
  constexpr int W = BDKD_BYTES / 2, half = lanes<R>;
  using B = Vec<int16_t, W>;
  using V = Vec<R, half>;
  B largest = loaded<B>(row), smallest = largest;
  const auto take = [&](int64_t i) INLINE_LAMBDA {
    const B v = loaded<B>(row + i);
    largest = v > largest ? v : largest, smallest = v < smallest ? v : smallest;
  };
  for (int64_t i = W; i + W <= count; i += W) take(i);
  take(count - W);  // the rest, and some a second time
  largest = largest >= 0 ? largest : smallest;
  V halves[2];
  for (int k = 0; k < 2; ++k) halves[k] = load<R>((const S*)&largest + k * half);
  return lane_max(larger<V>(halves[0], halves[1]));
}

// Of a row with a NaN, anything: the row's sums are NaN whatever is subtracted.
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
  const int64_t per_row = kept ? 6 * padded : padded + W;  // of q, a vector may begin anywhere
  const int64_t fitting = kept ? kGroupBytes / (per_row * (int64_t)sizeof(R)) : 1;
  const int group = fitting > kGroup ? kGroup : fitting > 1 ? (int)fitting : 1;  // rows at once
  R* const memory = scratch<R>(group * per_row);

  // Of row k of the group: (C,) the soft label, smoothed, padded with 0.
  INLINE R* q_of(int k) const { return memory + k * per_row; }
  // Where they are kept: for every vector of classes e of both at tau, a_t - a_s, and unless tau is 1
  // e of both at 1, side by side: one pointer, and no two streams a power of two apart.
  INLINE R* kept_of(int k) const { return q_of(k) + padded; }
  static constexpr int kKept = 5;

  // Past the cache: in whole aligned vectors, which rows that keep their exponentials vector by vector
  // must begin with, and others come to after a head.
  const bool streaming = call.streaming && (call.aligned || !kept);

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
  NOINLINE void sums(const S* s, const S* t, const S* ds, const S* dt, bool careful, int k,
                     NetworkSums& student, NetworkSums& teacher) const {
    const R max_s = student.max[k], max_t = teacher.max[k], to_log2 = this->to_log2;
    const int64_t C = this->C;
    const int squarings = this->squarings;
    const bool kd = !rare || this->kd, kept = this->kept, plain_entropy = this->plain_entropy;
    R* keep = kept_of(k);
    const S *const next_s = s + call.student.stride, *const next_t = t + call.teacher.stride;
    for (int64_t block = 0; block < C; block += kBlock * W) {
      V zs{}, zt{}, zg{}, z1s{}, z1t{}, azs{}, azt{}, gs{}, gt{}, xz1s{}, xz1t{};
      const int64_t end = block + kBlock * W < C ? block + kBlock * W : C;
      for (int64_t i = block; i < end; i += W, keep += kKept * W) {
        V xs = load_at<R>(s, i, C) - max_s, xt = load_at<R>(t, i, C) - max_t;
        V as = xs * to_log2, at = xt * to_log2;
        V e_s = exp2_of<R>(as), e_t = exp2_of<R>(at);
        const bool partial = i + W > C;
        __builtin_prefetch(next_s + i);  // this loop waits for arithmetic, its neighbours for memory
        __builtin_prefetch(next_t + i);
        if (ds) __builtin_prefetch(ds + i, 1);
        if (dt) __builtin_prefetch(dt + i, 1);
        if (partial) {
          const Mask<R> real = first_lanes<R>(C - i);
          e_s = real ? e_s : V{}, e_t = real ? e_t : V{};
          as = real ? as : V{}, at = real ? at : V{};
          xs = real ? xs : V{} - (R)INFINITY, xt = real ? xt : V{} - (R)INFINITY;
        }
        V g = at - as;
        if (kept) {
          memcpy(keep, &e_s, sizeof e_s);
          memcpy(keep + W, &e_t, sizeof e_t);
          memcpy(keep + 2 * W, &g, sizeof g);
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
            memcpy(keep + 3 * W, &e1_s, sizeof e1_s);
            memcpy(keep + 4 * W, &e1_t, sizeof e1_t);
          }
          z1s += e1_s;
          z1t += e1_t;
          if (rare && plain_entropy) {
            xz1s += careful || partial ? (e1_s == 0 ? V{} : e1_s * xs) : e1_s * xs;
            xz1t += careful || partial ? (e1_t == 0 ? V{} : e1_t * xt) : e1_t * xt;
          }
        }
      }
      student.z[k] += lane_sum<R>(zs), teacher.z[k] += lane_sum<R>(zt);
      if (kd) {
        student.az[k] += lane_sum<R>(azs), teacher.az[k] += lane_sum<R>(azt);
        student.gap[k] += lane_sum<R>(gs), teacher.gap[k] += lane_sum<R>(gt);
        teacher.z_gap[k] += lane_sum<R>(zg);
      }
      if (squarings != 0) {
        student.z1[k] += lane_sum<R>(z1s), teacher.z1[k] += lane_sum<R>(z1t);
        if (rare) student.xz1[k] += lane_sum<R>(xz1s), teacher.xz1[k] += lane_sum<R>(xz1t);
      }
    }
    if (squarings == 0) {
      student.z1[k] = student.z[k], teacher.z1[k] = teacher.z[k];
      student.xz1[k] = student.az[k] * kLn2, teacher.xz1[k] = teacher.az[k] * kLn2;
    }
  }

  // Label smoothing's sum of logit - max, or a soft label's sums of q and of q (logit - max).
  NOINLINE void target_sums(const S* s, int k, NetworkSums& network) const {
    const R max = network.max[k];
    const R* const q = q_of(k);
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
      network.x[k] += lane_sum<R>(sum_x), network.qx[k] += lane_sum<R>(sum_qx), network.q[k] += lane_sum<R>(sum_q);
    }
  }

  // A group's gradients: (e (gap + offset) - partner) over a row's exponentials and a_t - a_s, which
  // is  forward (p_s - p_t) + reverse p_s (ln(p_s / p_t) - R)  and its like with the sums put in.
  struct Coefficients {
    using Each = R[kGroup];
    Each gap{}, offset{};  // of e (a_t - a_s) and of e
    Each partner{};        // of the partner's e
    Each softmax{};        // of e at temperature 1
    Each target{};         // of q
    Each uniform{};        // of every class (label smoothing)
  };

  template <bool rare, bool kept>
  NOINLINE void gradients(const S* s, const S* t, S* ds, S* dt, int64_t label, bool careful, int row,
                          R max_s, R max_t, const Coefficients& student,
                          const Coefficients& teacher) const {
    struct {
      V gap, offset, partner, softmax, target, uniform;
    } ks, kt;
    const auto spread = [row](auto& wide, const Coefficients& k) {
      wide = {V{} + k.gap[row],     V{} + k.offset[row], V{} + k.partner[row],
              V{} + k.softmax[row], V{} + k.target[row], V{} + k.uniform[row]};
    };
    spread(ks, student), spread(kt, teacher);
    const int64_t C = this->C, own_label = labels ? label : -1;
    const int squarings = this->squarings;
    const R to_log2 = this->to_log2;
    const R *const q = q_of(row), *keep = kept_of(row);
    const int of_one = squarings == 0 ? 0 : 3 * W;
    const bool soft = this->soft, spread_target = soft || smooth, forward = o.teacher_forward;
    const bool student_kd = !rare || o.student_kd != 0, teacher_kd = !rare || o.teacher_kd != 0;
    const bool student_ce = !rare || this->student_ce, teacher_ce = !rare || this->teacher_ce;
    const bool streaming = this->streaming;

    const auto toward_target = [&](V gradient, int64_t i, V e1, const auto& k) INLINE_LAMBDA {
      gradient += e1 * k.softmax;
      if (spread_target) gradient -= soft ? loaded<V>(q + i) * k.target : k.uniform;
      if ((uint64_t)(own_label - i) < (uint64_t)W) {
        const Mask<R> it = first_lanes<R>(label - i + 1) & ~first_lanes<R>(label - i);
        gradient -= it ? k.target : V{};
      }
      return gradient;
    };
    const auto put = [&](S* row, int64_t i, int64_t end, V gradient) INLINE_LAMBDA {
      if (i + W > end) store_some<R>(row + i, gradient, end - i);
      else if (streaming) store_past_the_cache<R>(row + i, gradient);
      else store<R>(row + i, gradient);
    };
    constexpr int64_t whole = W * sizeof(S);
    const int64_t head = streaming ? -(uintptr_t)(ds ? ds : dt) % whole / sizeof(S) : 0;
    for (int64_t i = 0, end = head ? head : C; i < C; i = i < head ? head : i + W, end = C) {
      V e_s, e_t, g, e1_s{}, e1_t{};
      if (kept) {
        e_s = loaded<V>(keep), e_t = loaded<V>(keep + W), g = loaded<V>(keep + 2 * W);
        e1_s = loaded<V>(keep + of_one), e1_t = loaded<V>(keep + of_one + W);
        keep += kKept * W;
      } else {
        const V xs = load_at<R>(s, i, end) - max_s, xt = load_at<R>(t, i, end) - max_t;
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
        put(ds, i, end, gradient);
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
        put(dt, i, end, gradient);
      }
    }
  }

  static double upstream(const Logits& logits, int64_t row) {
    return logits.upstream ? (double)((const R*)logits.upstream)[row] : logits.scale;
  }

  // Rows first .. first + n, n <= group; s, t, ds and dt point at the first of them.
  void operator()(int64_t first, int n, const S* s, const S* t, S* ds, S* dt) const {
    const auto at = [](auto* rows, int64_t stride, int k) { return rows ? rows + k * stride : nullptr; };
    const auto &of_s = call.student, &of_t = call.teacher;
    NetworkSums student, teacher;
    Scalars row;
    for (int k = 0; k < n; ++k) {
      const S *const s_k = s + k * of_s.stride, *const t_k = t + k * of_t.stride;
      S *const ds_k = at(ds, of_s.gradient_stride, k), *const dt_k = at(dt, of_t.gradient_stride, k);
      row.counted[k] = one_row(first + k, k, s_k, t_k, ds_k, dt_k, student, teacher, row);
      if (row.counted[k]) continue;
      if (ds) memset((void*)ds_k, 0, C * sizeof(S));
      if (dt) memset((void*)dt_k, 0, C * sizeof(S));
    }
    Coefficients to_s, to_t;
    for (int k = 0; k < n; k += lanes<double>) scalars(first, k, n, student, teacher, row, to_s, to_t);
    if (!ds && !dt) return;
    for (int k = 0; k < n; ++k) {
      if (!row.counted[k]) continue;
      // The common loops multiply an absent term by 0. The rare one leaves it out: of a row that
      // holds what is not finite, and where it would cost exponentials.
      const bool rare =
          row.careful[k] || !kd || o.teacher_forward || (squarings < 0 && !(student_ce && teacher_ce));
      const auto run = rare ? (kept ? &Rows::gradients<true, true> : &Rows::gradients<true, false>)
                            : (kept ? &Rows::gradients<false, true> : &Rows::gradients<false, false>);
      (this->*run)(s + k * of_s.stride, t + k * of_t.stride, at(ds, of_s.gradient_stride, k),
                   at(dt, of_t.gradient_stride, k), row.label[k], row.careful[k], k, student.max[k],
                   teacher.max[k], to_s, to_t);
    }
  }

  struct Scalars {  // of each row of a group, beside its sums
    using Each = double[kGroup];
    int64_t label[kGroup];
    bool careful[kGroup];
    Each counted{}, q{};              // 0: ignored; the sum of its target
    Each label_s{}, label_t{};        // the label's logit - max
    Each correct_s{}, correct_t{};
    Each weight{}, upstream_s{}, upstream_t{};
  };

  // Row k's maxima and sums; false where it is ignored.
  bool one_row(int64_t number, int k, const S* s, const S* t, const S* ds, const S* dt, NetworkSums& student,
               NetworkSums& teacher, Scalars& row) const {
    int64_t label = labels ? ((const int64_t*)call.target)[number] : -1;
    if (labels && label == o.ignore_index) return false;
    const bool no_such_label = labels && (label < 0 || label >= C);
    if (no_such_label) label = 0;
    if (soft) label = soft_row<R>(call, number, q_of(k));

    const double max_s = student.max[k] = row_max<R>(s, C), max_t = teacher.max[k] = row_max<R>(t, C);
    if (label >= 0) {
      row.label_s[k] = value(s[label]) - max_s, row.label_t[k] = value(t[label]) - max_t;
      row.correct_s[k] = row.label_s[k] == 0 && is_first<R>(s, label, max_s);
      row.correct_t[k] = row.label_t[k] == 0 && is_first<R>(t, label, max_t);
    }
    if (streaming) ds = dt = nullptr;  // not to be fetched
    if (kd && !plain_entropy) sums<false>(s, t, ds, dt, false, k, student, teacher);
    else sums<true>(s, t, ds, dt, false, k, student, teacher);
    // A class masked by -inf, or inf or NaN, shows as a NaN here: 0 * inf needs the careful path.
    row.careful[k] = kd && !std::isfinite(student.az[k] + teacher.az[k] + student.gap[k] + teacher.gap[k] +
                                          student.xz1[k] + teacher.xz1[k]);
    if (row.careful[k]) {
      student.clear(k), teacher.clear(k);
      sums<true>(s, t, ds, dt, true, k, student, teacher);
    }
    if (student_ce && (soft || smooth)) target_sums(s, k, student);
    if (teacher_ce && (soft || smooth)) target_sums(t, k, teacher);

    row.label[k] = label;
    row.q[k] = soft ? (student_ce ? student.q[k] : teacher.q[k]) : 1;
    if (no_such_label) row.q[k] = row.label_s[k] = row.label_t[k] = NAN;
    row.weight[k] = call.weight ? (double)((const R*)call.weight)[number] : 1;
    row.upstream_s[k] = upstream(call.student, number), row.upstream_t[k] = upstream(call.teacher, number);
    return true;
  }

  // What follows from the sums: losses, statistics and coefficients of rows k .. k + lanes of a group
  // of n. Lanes of ignored rows hold anything until they are written, as 0.
  NOINLINE void scalars(int64_t first, int k, int n, const NetworkSums& student, const NetworkSums& teacher,
                        const Scalars& row, Coefficients& to_s, Coefficients& to_t) const {
    constexpr int D = lanes<double>;
    using W = Vec<double, D>;
    const auto of = [k](const double* each) INLINE_LAMBDA { return loaded<W>(each + k); };
    const W one = W{} + 1, counted = of(row.counted), per_z1s = 1 / of(student.z1), per_z1t = 1 / of(teacher.z1);
    const W log_z1s = log_of<W>(of(student.z1)), log_z1t = log_of<W>(of(teacher.z1)), q_sum = of(row.q);
    const double smoothing = o.label_smoothing;
    const auto cross_entropy = [&](const NetworkSums& sums, W label_x, W log_z1) INLINE_LAMBDA {
      if (soft) return q_sum * log_z1 - of(sums.qx);
      const W loss = log_z1 - label_x;
      return smooth ? (1 - smoothing) * loss + smoothing * (log_z1 - of(sums.x) / (double)C) : loss;
    };
    W ce_s{}, ce_t{};
    if (student_ce) ce_s = cross_entropy(student, of(row.label_s), log_z1s);
    if (teacher_ce) ce_t = cross_entropy(teacher, of(row.label_t), log_z1t);

    W entropy_s{}, entropy_t{}, d1{}, d2{}, forward{}, reverse{}, log_zt_over_zs{};
    W per_zs = per_z1s, per_zt = per_z1t, log_zs = log_z1s, log_zt = log_z1t;
    if (kd) {
      if (squarings != 0) {
        per_zs = 1 / of(student.z), per_zt = 1 / of(teacher.z);
        log_zs = log_of<W>(of(student.z)), log_zt = log_of<W>(of(teacher.z));
      }
      // Near distributions: the sums' own roundings, 1e-7 of each, would drown their divergence.
      const W change = of(teacher.z_gap) * per_zs;
      log_zt_over_zs = (change < 0.25) & (change > -0.25) ? log1p_near_0<W>(change) : log_zt - log_zs;
      if (plain_entropy) {
        entropy_s = log_z1s - of(student.xz1) * per_z1s, entropy_t = log_z1t - of(teacher.xz1) * per_z1t;
      } else {
        entropy_s = log_zs - kLn2 * of(student.az) * per_zs, entropy_t = log_zt - kLn2 * of(teacher.az) * per_zt;
      }
      d1 = entropy_t > entropy_s ? W{} + o.gamma : one, d2 = entropy_s > entropy_t ? W{} + o.gamma : one;
      forward = kLn2 * of(teacher.gap) * per_zt - log_zt_over_zs;
      reverse = log_zt_over_zs - kLn2 * of(student.gap) * per_zs;
    }

    const auto put = [k](R* each, W value) INLINE_LAMBDA {
      const Vec<R, D> narrow = __builtin_convertvector(value, Vec<R, D>);
      memcpy((void*)(each + k), &narrow, sizeof narrow);
    };
    const auto to_target = [&](Coefficients& to, W scale, W per_z1) INLINE_LAMBDA {
      put(to.softmax, scale * q_sum * per_z1);
      put(to.target, scale * (labels ? 1 - smoothing : 1));
      put(to.uniform, scale * (smoothing / C));
    };
    const W weight = of(row.weight);
    if (call.student.gradient) {
      const W scale = weight * call.per_row * of(row.upstream_s), kd_scale = scale * o.student_kd * tau;
      put(to_s.gap, -kd_scale * d2 * kLn2 * per_zs);
      put(to_s.offset, kd_scale * (d1 + d2 * (log_zt_over_zs - reverse)) * per_zs);
      put(to_s.partner, kd_scale * d1 * per_zt);
      if (student_ce) to_target(to_s, scale * o.student_ce, per_z1s);
    }
    if (call.teacher.gradient) {
      const W scale = weight * call.per_row * of(row.upstream_t), kd_scale = scale * o.teacher_kd * tau;
      put(to_t.gap, kd_scale * kLn2 * per_zt);
      put(to_t.offset, kd_scale * (o.teacher_forward ? -log_zt_over_zs - forward : one) * per_zt);
      put(to_t.partner, kd_scale * per_zs);
      if (teacher_ce) to_target(to_t, scale * o.teacher_ce, per_z1t);
    }

    const auto write = [&](auto* rows, W value) INLINE_LAMBDA {
      using T = std::decay_t<decltype(*rows)>;
      const auto narrow = __builtin_convertvector(counted != 0 ? value : W{}, Vec<T, D>);
      if (n - k >= D) memcpy((void*)(rows + first + k), &narrow, sizeof narrow);
      else memcpy((void*)(rows + first + k), &narrow, sizeof(T) * (n - k));
    };
    if (call.stats) {
      const W z1s = of(student.z1), z1t = of(teacher.z1);
      const W stats[kStats] = {forward, reverse, entropy_s, entropy_t, ce_s, ce_t, d1, d2, per_z1s, per_z1t,
                               z1s == z1s ? of(row.correct_s) : W{}, z1t == z1t ? of(row.correct_t) : W{}};
      for (int stat = 0; stat < kStats; ++stat) write((R*)call.stats + stat * call.rows, stats[stat]);
    }
    if (call.student_loss) {
      W student_loss{}, teacher_loss{};
      if (o.student_kd != 0) student_loss += o.student_kd * tau * tau * (d1 * forward + d2 * reverse);
      if (o.teacher_kd != 0) teacher_loss += o.teacher_kd * tau * tau * (o.teacher_forward ? forward : reverse);
      if (student_ce) student_loss += o.student_ce * ce_s;
      if (teacher_ce) teacher_loss += o.teacher_ce * ce_t;
      write(call.student_loss, weight * student_loss);
      write(call.teacher_loss, weight * teacher_loss);
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
  const Rows<S> rows{call};
  const auto &s = call.student, &t = call.teacher;
  for (int64_t row = begin; row < end; row += rows.group)
    rows(row, end - row < rows.group ? end - row : rows.group, (const S*)s.rows + row * s.stride,
         (const S*)t.rows + row * t.stride, s.gradient ? (S*)s.gradient + row * s.gradient_stride : nullptr,
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
    one_row(row, 1, a, b, s.gradient ? a : nullptr, t.gradient ? b : nullptr);
    if (s.gradient) narrow<R>(s.storage, a, call.classes, s.gradient, row * s.gradient_stride);
    if (t.gradient) narrow<R>(t.storage, b, call.classes, t.gradient, row * t.gradient_stride);
  }
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {{run<float>, run<double>, run<Half>, run<BFloat>}, run_mixed<float>, run_mixed<double>};

}  // namespace BDKD_ISA
