// The loss of one row: a pass for the maxima, one for the sums at both temperatures and of the
// divergences, one for the gradients. With 32 registers, the passes of three rows go through one loop:
// the maxima of the next, the sums of this, the gradients of an earlier one. Compiled once per instruction set.
//
// Notation: x = logit - max, e = exp(x / tau), e1 = exp(x); Z = sum e; p = e / Z; g = x_t - x_s.
// KL(p_t || p_s) = sum p_t g / tau - ln(Z_t / Z_s): of differences class by class, which are small
// where the distributions are near, and of Z_t / Z_s from sum (e_t - e_s). A difference of two sums
// over classes, as from E[u] and E[v], would lose such a divergence.
#include <initializer_list>
#include <limits>
#include <memory>

#include "call.h"
#include "simd.h"

namespace BDKD_ISA {
namespace {

constexpr double kLog2E = 1.44269504088896341;
constexpr int64_t kChunk = 1024;  // classes of a row not kept that go through both passes while they are near
constexpr int64_t kAheadBytes = 16 << 10;  // of logits from those in work to those that are fetched
constexpr bool kWide = BDKD_BYTES == 64;  // 32 registers, which two loops in one take
constexpr int kBlock = 64;  // vectors summed in the compute type before float64 takes them over

// Rows whose scalars (logarithms, divergences, weights, coefficients) are worked out side by side,
// a lane each: for few classes they cost more than the classes do. No row's result depends on which
// others stand beside it.
constexpr int kGroup = 8;
constexpr int64_t kGroupBytes = 96 << 10;  // what is kept of a group's rows: it stays near

struct NetworkSums {  // over each row of a group, of one network
  using Each = double[kGroup];
  Each max{};
  Each z{}, z1{};         // of e, of e1
  Each xz{}, xz1{};       // of e x, of e1 x
  Each gap{};             // of e g
  Each z_gap{};           // teacher's: of e_t - e_s
  Each x{}, qx{}, q{};    // of x; of q x; of q

  void clear(int k) {  // all but max
    z[k] = z1[k] = xz[k] = xz1[k] = gap[k] = z_gap[k] = 0;
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

// Whether `label` is the first largest class, by bits: where floats below the normal range count as 0.
template <class S>
NOINLINE bool is_first_by_bits(const S* row, int64_t label, int64_t count) {
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

// A row of a storage type as the compute type; `to` is padded to whole vectors.
template <class R, class S>
void widen_as(const void* from, int64_t count, R* to) {
  for (int64_t i = 0; i < count; i += lanes<R>) {
    auto v = load_at<R>((const S*)from, i, count);
    memcpy(to + i, &v, sizeof v);
  }
}
template <class R>
void widen(Storage storage, const void* rows, int64_t first, int64_t count, R* to) {
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
void narrow(Storage storage, const R* from, int64_t count, void* rows, int64_t first) {
  switch (storage) {
    case kFloat32: return narrow_as<R, float>(from, count, (float*)rows + first);
    case kFloat64: return narrow_as<R, double>(from, count, (double*)rows + first);
    case kFloat16: return narrow_as<R, Half>(from, count, (Half*)rows + first);
    default: return narrow_as<R, BFloat>(from, count, (BFloat*)rows + first);
  }
}

template <class R>
int64_t soft_row(const Call& call, int64_t row, R* q) {  // the row, smoothed; its first largest class
  widen<R>(call.target_storage, call.target, row * call.classes, call.classes, q);
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
  const bool labels = call.target_kind == kLabels, soft = call.target_kind == kProbabilities;
  const bool student_ce = o.student_ce != 0 && call.target_kind != kNoTarget;
  const bool teacher_ce = o.teacher_ce != 0 && call.target_kind != kNoTarget;
  const bool smooth = labels && o.label_smoothing != 0 && (student_ce || teacher_ce);
  const bool plain_entropy = kd && !o.soften_entropy;
  const bool teacher_forward = o.teacher_divergence == kTeacherDivergenceForward;
  const double tau = kd ? o.temperature : 1.0;
  const R to_log2 = kLog2E / tau;
  // e1 = e^tau: by multiplications for a tau of 1, 2, 4, 8; 0: another exponential.
  const int power = tau == 1 || tau == 2 || tau == 4 || tau == 8 ? (int)tau : 0;
  const int64_t kept_vectors = power ? 3 : 5;
  // Exponentials are kept, not made again, while the second cache holds those of a row: but for float32 in
  // wide vectors with two of them a class, which take no time of their own under what memory takes.
  const int64_t kept_bytes = (kWide && sizeof(S) == 4 && power ? 48 : 512) << 10;
  const bool kept = kept_vectors * padded * (int64_t)sizeof(R) <= kept_bytes;
  const int64_t per_vector = padded + W;  // a vector's width apart: no two begin a power of two apart
  const int64_t per_row = per_vector * (soft + (kept ? kept_vectors : 0));
  const int64_t fitting = kept ? kGroupBytes / (per_row * (int64_t)sizeof(R)) : 1;
  const int group = fitting > kGroup ? kGroup : fitting > 1 ? (int)fitting : 1;  // rows at once
  R* const memory = scratch<R>(group * per_row);

  // Of row k of the group: (C,) the soft label, smoothed, padded with 0.
  INLINE R* q_of(int k) const { return memory + k * per_row; }
  // Where they are kept: e_s, e_t, g, and where `power` is 0 both e1, of (C,) each.
  INLINE R* kept_of(int k) const { return q_of(k) + per_vector * soft; }

  // So far down from a kept row, and so many classes further, are the logits that are fetched.
  const int64_t rows_ahead = C > 2 * kChunk ? 1 : 1 + (kAheadBytes - 1) / (2 * C * (int64_t)sizeof(S));
  const int64_t classes_ahead = C > 2 * kChunk ? 2 * kChunk : 0;

  const bool streaming = call.nontemporal && C >= 16 * W;  // past the cache; few classes fill no lines

  // Where a class may be masked, x to_log2 is raised to this: 2 to its power is 0. At temperature 1 the
  // floor is another x: a temperature below 1 has 0 where e^x is not.
  static constexpr int kFloor = -4096;

  // What rows rarely need has loops of its own, so that the common ones hold their sums in registers.
  static constexpr int kRare = -1;  // in the place of `power`

  // e1 of e: the root of it, which is squared last; and where `power` is 1 or 0, e1 itself.
  template <int power>
  static INLINE V root_at_one(V e, V x, int any_power) {
    const int n = power == kRare ? any_power : power;
    if (n == 0) return exp2_of<R>(x, V{} + (R)kLog2E);
    if (n > 2) e *= e;
    if (n > 4) e *= e;
    return e;
  }
  template <int power>
  static INLINE V at_one(V e, V x, int any_power) {
    const V root = root_at_one<power>(e, x, any_power);
    return (power == kRare ? any_power : power) > 1 ? root * root : root;
  }

  template <int power>
  static INLINE V plus_at_one(V sum, V root, int any_power) {
    return (power == kRare ? any_power : power) > 1 ? multiply_add<V>(root, root, sum) : sum + root;
  }

  // `e x`; carefully, 0 where e is, as of a masked class, whose x is not finite.
  template <int power>
  static INLINE V product(V e, V x, bool careful) {
    return power == kRare && careful ? (e == 0 ? V{} : e * x) : e * x;
  }

  struct LaneSums {
    V z{}, z1{}, xz{}, xz1{}, gap{};
    INLINE void reduce(int k, NetworkSums& to) const {
      to.z[k] += lane_sum<R>(z), to.z1[k] += lane_sum<R>(z1), to.xz[k] += lane_sum<R>(xz);
      to.gap[k] += lane_sum<R>(gap);
    }
  };

  struct RowPair {  // logits of both networks
    const S *s, *t;
    bool operator==(const RowPair& other) const { return s == other.s && t == other.t; }
    RowPair operator+(int64_t classes) const { return {s + classes, t + classes}; }
  };
  RowPair down(RowPair row, int64_t n) const { return {row.s + n * call.student.stride, row.t + n * call.teacher.stride}; }

  // Classes begin .. end of row k of the group, and what is done beside their sums.
  struct Piece {
    int k;
    RowPair row;
    int64_t begin, end;
    RowPair next{};  // of as many classes, whose maxima are taken; or null
    RowPair fetched;  // of as many
    const S *ds{}, *dt{};  // the row's gradients, to be fetched; or null
    bool careful = false;
  };

  struct Maxima {
    RowPair of{};
    R s{}, t{};
  };

  // Adds a piece's; `before_each` runs before each vector. Of all loops this one has the most arithmetic, under
  // which memory's work hides: logits are fetched here, and those of the piece after it looked through.
  template <int power, bool kept, bool fetch_gradients, class BeforeEach>
  INLINE void add_up(const Piece& piece, NetworkSums& student, NetworkSums& teacher, BeforeEach before_each) {
    constexpr bool rare = power == kRare;
    const int k = piece.k;
    const bool careful = piece.careful;
    const S *const s = piece.row.s, *const t = piece.row.t, *const ds = piece.ds, *const dt = piece.dt;
    const RowPair fetched = piece.fetched + -piece.begin, next = (piece.next.s ? piece.next : piece.row) + -piece.begin;
    const V to_log2 = V{} + this->to_log2, floor = (R)kFloor / to_log2, floor_at_one = V{} + (R)(kFloor / kLog2E);
    const R max_s = student.max[k], max_t = teacher.max[k];
    const int64_t C = this->C;
    const int any_power = this->power;
    const bool kd = !rare || this->kd, keep = rare ? this->kept : kept, plain_entropy = rare && this->plain_entropy;
    R* const keeps = kept_of(k);
    const int64_t per_vector = this->per_vector, end = piece.end;
    V next_s = V{} - (R)INFINITY, next_t = next_s;
    for (int64_t block = piece.begin; block < end; block += kBlock * W) {
      LaneSums of_s, of_t;
      V z_gap{};
      const auto add = [&](int64_t i, auto whole) INLINE_LAMBDA {
        V xs, xt;
        if constexpr (whole) xs = load<R>(s + i) - max_s, xt = load<R>(t + i) - max_t;
        else xs = load_some<R>(s + i, C - i) - max_s, xt = load_some<R>(t + i, C - i) - max_t;
        const bool floored = rare && careful;
        V e_s = exp2_of<R>(floored ? larger<V>(floor, xs) : xs, to_log2);
        V e_t = exp2_of<R>(floored ? larger<V>(floor, xt) : xt, to_log2);
        V r1_s = root_at_one<power>(e_s, floored ? larger<V>(floor_at_one, xs) : xs, any_power);
        V r1_t = root_at_one<power>(e_t, floored ? larger<V>(floor_at_one, xt) : xt, any_power);
        __builtin_prefetch(fetched.s + i);
        __builtin_prefetch(fetched.t + i);
        if (fetch_gradients && ds) __builtin_prefetch(ds + i, 1);
        if (fetch_gradients && dt) __builtin_prefetch(dt + i, 1);
        if constexpr (kWide && whole)
          next_s = larger<V>(next_s, load<R>(next.s + i)), next_t = larger<V>(next_t, load<R>(next.t + i));
        if constexpr (!whole) {
          const Mask<R> real = first_lanes<R>(C - i);
          if constexpr (kWide) {
            const V last_s = load_some<R>(next.s + i, C - i), last_t = load_some<R>(next.t + i, C - i);
            next_s = real ? larger<V>(next_s, last_s) : next_s, next_t = real ? larger<V>(next_t, last_t) : next_t;
          }
          e_s = real ? e_s : V{}, e_t = real ? e_t : V{}, r1_s = real ? r1_s : V{}, r1_t = real ? r1_t : V{};
          xs = real ? xs : V{}, xt = real ? xt : V{};
        }
        const V g = xt - xs;
        if (keep) {
          R* to = keeps + i;
          store<R>(to, e_s), store<R>(to += per_vector, e_t), store<R>(to += per_vector, g);
          if (power == 0 || (rare && any_power == 0))
            store<R>(to += per_vector, r1_s), store<R>(to += per_vector, r1_t);
        }
        of_s.z += e_s, of_t.z += e_t;
        if constexpr (power != 1) {
          of_s.z1 = plus_at_one<power>(of_s.z1, r1_s, any_power);
          of_t.z1 = plus_at_one<power>(of_t.z1, r1_t, any_power);
        }
        if (kd) {
          z_gap += e_t - e_s;
          of_s.xz += product<power>(e_s, xs, careful), of_t.xz += product<power>(e_t, xt, careful);
          of_s.gap += product<power>(e_s, g, careful), of_t.gap += product<power>(e_t, g, careful);
        }
        if (plain_entropy) {
          const V e1_s = any_power > 1 ? r1_s * r1_s : r1_s, e1_t = any_power > 1 ? r1_t * r1_t : r1_t;
          of_s.xz1 += product<power>(e1_s, xs, careful), of_t.xz1 += product<power>(e1_t, xt, careful);
        }
      };
      const int64_t stop = block + kBlock * W < end ? block + kBlock * W : end;
      int64_t i = block;
      for (; i + W <= stop; i += W) before_each(), add(i, std::true_type{});
      if (i < stop) before_each(), add(i, std::false_type{});
      of_s.reduce(k, student), of_t.reduce(k, teacher);
      teacher.z_gap[k] += lane_sum<R>(z_gap);
      if (plain_entropy) student.xz1[k] += lane_sum<R>(of_s.xz1), teacher.xz1[k] += lane_sum<R>(of_t.xz1);
    }
    if constexpr (kWide) ahead = {piece.next, lane_max(next_s), lane_max(next_t)};
  }

  template <int power, bool kept>
  NOINLINE void sums(const Piece& piece, NetworkSums& student, NetworkSums& teacher) {
    add_up<power, kept, true>(piece, student, teacher, []() INLINE_LAMBDA {});
  }

  // Of `count` classes; taken already, as a rule.
  INLINE Maxima maxima(RowPair logits, int64_t count) const {
    return ahead.of == logits ? ahead : Maxima{logits, (R)row_max<R>(logits.s, count), (R)row_max<R>(logits.t, count)};
  }

  // Row k's sums so far, and its maxima, for maxima of more of its classes.
  NOINLINE void raise(int k, double max_s, double max_t, NetworkSums& student, NetworkSums& teacher) const {
    const double up_s = max_s - student.max[k], up_t = max_t - teacher.max[k];
    const bool first = student.z[k] == 0;
    if (up_s > 0 || first) student.max[k] = max_s;
    if (up_t > 0 || first) teacher.max[k] = max_t;
    if (first || !(up_s > 0 || up_t > 0)) return;
    const double by_s = up_s > 0 ? up_s : 0, by_t = up_t > 0 ? up_t : 0;
    const double f_s = std::exp(-by_s / tau), f_t = std::exp(-by_t / tau);
    const auto raised = [k](NetworkSums& sums, double by, double f, double f1, double gap_by) {
      sums.gap[k] = f * (sums.gap[k] + gap_by * sums.z[k]);
      sums.xz[k] = f * (sums.xz[k] - by * sums.z[k]), sums.xz1[k] = f1 * (sums.xz1[k] - by * sums.z1[k]);
      sums.z[k] *= f, sums.z1[k] *= f1;
    };
    teacher.z_gap[k] = f_t * teacher.z_gap[k] + (f_t - f_s) * student.z[k];
    raised(student, by_s, f_s, std::exp(-by_s), by_s - by_t);
    raised(teacher, by_t, f_t, std::exp(-by_t), by_s - by_t);
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

  // A group's gradients: (e (g gap + offset) - partner) over a row's exponentials, which is
  // forward (p_s - p_t) + reverse p_s (ln(p_s / p_t) - R)  and its like with the sums put in.
  struct Coefficients {
    using Each = R[kGroup];
    Each gap{}, offset{};  // of e g and of e
    Each partner{};        // of the partner's e
    Each softmax{};        // of e1
    Each target{};         // of q
    Each uniform{};        // of every class (label smoothing)
  };
  struct Spread {
    V gap, offset, partner, softmax, target, uniform;
    INLINE Spread(const Coefficients& k, int row)
        : gap(V{} + k.gap[row]), offset(V{} + k.offset[row]), partner(V{} + k.partner[row]),
          softmax(V{} + k.softmax[row]), target(V{} + k.target[row]), uniform(V{} + k.uniform[row]) {}
  };

  struct Due {  // a row whose gradients are still to be made
    bool waits = false, careful = false;
    RowPair row{};
    S *ds{}, *dt{};
    int64_t label = 0;
    R max_s{}, max_t{};
    int64_t made = 0;  // of its classes
  };

  // Makes a row's gradients, vector by vector. What is absent has coefficients of 0; each term's parts stand
  // together, so that of one class they are 0. `plain`: of both networks, stored past the cache, no target but
  // a label.
  template <int power, bool kept, bool plain>
  struct Gradients {
    static constexpr bool rare = power == kRare;
    const Spread ks, kt;
    const V to_log2, floor = (R)kFloor / to_log2, floor_at_one = V{} + (R)(kFloor / kLog2E);
    const int64_t C, own_label, per_vector;
    const int any_power;
    const R *const q, *const keeps;
    const bool soft, smooth, streaming, forward, student_kd, teacher_kd, student_ce, teacher_ce;
    const S *const s, *const t;
    S *const ds, *const dt;
    const R max_s, max_t;
    int64_t i;

    INLINE Gradients(const Rows& rows, const Due& due, int k)
        : ks(rows.to_s, k), kt(rows.to_t, k), to_log2(V{} + rows.to_log2), C(rows.C),
          own_label(rows.labels ? due.label : -1), per_vector(rows.per_vector), any_power(rows.power),
          q(rows.q_of(k)), keeps(rows.kept_of(k)), soft(rows.soft), smooth(rows.smooth), streaming(rows.streaming),
          forward(rows.teacher_forward), student_kd(rows.o.student_kd != 0), teacher_kd(rows.o.teacher_kd != 0),
          student_ce(rows.student_ce), teacher_ce(rows.teacher_ce), s(due.row.s), t(due.row.t), ds(due.ds),
          dt(due.dt), max_s(due.max_s), max_t(due.max_t), i(due.made) {
      // Stores past the cache are of whole lines: what comes before the first is a head of its own.
      int64_t head = (plain || streaming) && i == 0 ? -(uintptr_t)(ds ? ds : dt) % (W * sizeof(S)) / sizeof(S) : 0;
      if (head > C) head = C;
      if (head) make(head, std::false_type{});
    }

    static INLINE V gradient_of(V e, V e_partner, V g, V e1, const Spread& k) {
      const V of_e = multiply_add<V>(g, k.gap, k.offset);
      return multiply_add<V>(e1, k.softmax, multiply_add<V>(e, of_e, -(e_partner * k.partner)));
    }

    INLINE bool next() {  // vector; whether there was one left
      if (i + W <= C) make(i + W, std::true_type{});
      else if (i < C) make(C, std::false_type{});
      else return false;
      return true;
    }

    template <class Whole>
    INLINE void make(int64_t end, Whole whole) {  // of classes i .. end
      V xs, xt, e_s, e_t, g, e1_s{}, e1_t{};
      if constexpr (kept) {
        const R* from = keeps + i;
        e_s = load<R>(from), e_t = load<R>(from += per_vector), g = load<R>(from += per_vector);
        if constexpr (power == 0) e1_s = load<R>(from += per_vector), e1_t = load<R>(from += per_vector);
        else e1_s = at_one<power>(e_s, V{}, 0), e1_t = at_one<power>(e_t, V{}, 0);
      } else {
        if constexpr (whole) xs = load<R>(s + i) - max_s, xt = load<R>(t + i) - max_t;
        else xs = load_some<R>(s + i, end - i) - max_s, xt = load_some<R>(t + i, end - i) - max_t;
        g = xt - xs;
        e_s = exp2_of<R>(rare ? larger<V>(floor, xs) : xs, to_log2);
        e_t = exp2_of<R>(rare ? larger<V>(floor, xt) : xt, to_log2);
        if constexpr (rare) xs = larger<V>(floor_at_one, xs), xt = larger<V>(floor_at_one, xt);
        if (power > 0 || (ds && student_ce)) e1_s = at_one<power>(e_s, xs, any_power);
        if (power > 0 || (dt && teacher_ce)) e1_t = at_one<power>(e_t, xt, any_power);
      }
      V of_s{}, of_t{};
      if constexpr (rare) {
        const V of_e_t = forward ? g * kt.gap + kt.offset : kt.offset;
        if (student_kd) of_s = product<power>(e_s, g * ks.gap + ks.offset, true) - e_t * ks.partner;
        if (teacher_kd) of_t = product<power>(e_t, of_e_t, true) - e_s * kt.partner;
        if (student_ce) of_s += e1_s * ks.softmax;
        if (teacher_ce) of_t += e1_t * kt.softmax;
      } else {
        of_s = gradient_of(e_s, e_t, g, e1_s, ks), of_t = gradient_of(e_t, e_s, g, e1_t, kt);
      }
      if (!plain && soft) {
        const V q_i = loaded<V>(q + i);
        if (student_ce) of_s -= q_i * ks.target;
        if (teacher_ce) of_t -= q_i * kt.target;
      }
      if (!plain && smooth) of_s -= ks.uniform, of_t -= kt.uniform;
      if ((uint64_t)(own_label - i) < (uint64_t)(end - i)) {
        const Mask<R> at_label = first_lanes<R>(own_label - i + 1) & ~first_lanes<R>(own_label - i);
        of_s -= at_label ? ks.target : V{}, of_t -= at_label ? kt.target : V{};
      }
      const auto put = [&](S* row, V gradient) INLINE_LAMBDA {
        if (!plain && !row) return;
        if constexpr (!whole) store_some<R>(row + i, gradient, end - i);
        else if (plain || streaming) store_past_the_cache<R>(row + i, gradient);
        else store<R>(row + i, gradient);
      };
      put(ds, of_s);
      put(dt, of_t);
      i = end;
    }
  };

  // Of row k of the group, or what is left of them.
  template <int power, bool kept>
  NOINLINE void gradients(int k) {
    Gradients<power, kept, false> gradients(*this, due[k], k);
    while (gradients.i + W <= C) gradients.make(gradients.i + W, std::true_type{});
    if (gradients.i < C) gradients.make(C, std::false_type{});
  }

  // A piece's sums, and as many gradients of the row that had its place in the group before: the ones wait
  // for arithmetic and loads, the others for stores. What is kept of that row gives way vector by vector.
  template <int power, bool kept>
  NOINLINE void sums_and_gradients(const Piece& piece, NetworkSums& student, NetworkSums& teacher) {
    Gradients<power, kept, true> gradients(*this, due[piece.k], piece.k);
    add_up<power, kept, false>(piece, student, teacher, [&]() INLINE_LAMBDA { gradients.next(); });
    due[piece.k].made = gradients.i;
  }

  struct Loops {
    void (Rows::*sums)(const Piece&, NetworkSums&, NetworkSums&);
    void (Rows::*sums_and_gradients)(const Piece&, NetworkSums&, NetworkSums&);  // or null
    void (Rows::*gradients)(int);
  };
  template <int power, bool kept>
  static Loops loops_of() {
    // Gradients of 2 bytes made anew wait for arithmetic too.
    if constexpr (kWide && W == 16 && (kept || sizeof(S) == 4))
      return {&Rows::sums<power, kept>, &Rows::sums_and_gradients<power, kept>, &Rows::gradients<power, kept>};
    else
      return {&Rows::sums<power, kept>, nullptr, &Rows::gradients<power, kept>};
  }
  template <bool kept>
  Loops loops_of() const {
    return power == 1   ? loops_of<1, kept>()
           : power == 2 ? loops_of<2, kept>()
           : power == 4 ? loops_of<4, kept>()
           : power == 8 ? loops_of<8, kept>()
                        : loops_of<0, kept>();
  }
  Loops loops() const {
    Loops common = kept ? loops_of<true>() : loops_of<false>();
    if (plain_entropy) common.sums = &Rows::sums<kRare, false>;
    const bool plain = streaming && call.student.gradient && call.teacher.gradient && !soft && !smooth;
    if (!plain || plain_entropy) common.sums_and_gradients = nullptr;
    return common;
  }
  const Loops common = loops();
  Coefficients to_s, to_t;
  Due due[kGroup];
  Maxima ahead;

  static double upstream(const Network& logits, int64_t row) {
    return logits.upstream ? (double)((const R*)logits.upstream)[row] : logits.scale;
  }

  void make_gradients(int k) {  // those that are due
    if (!due[k].waits) return;
    (this->*(due[k].careful ? &Rows::gradients<kRare, false> : common.gradients))(k);
    due[k].waits = false;
  }
  void finish() {
    for (int k = 0; k < group; ++k) make_gradients(k);
  }

  // Rows first .. first + n, n <= group; up to `last` this thread may go on. `logits`, ds and dt: of the
  // first. Gradients may still be due afterwards: `finish` makes them.
  void operator()(int64_t first, int n, int64_t last, RowPair logits, S* ds, S* dt) {
    NetworkSums student, teacher;
    Scalars row;
    const auto gradient = [](S* rows, int64_t stride, int k) { return rows ? rows + k * stride : nullptr; };
    for (int k = 0; k < n; ++k) {
      S* const ds_k = gradient(ds, call.student.gradient_stride, k);
      S* const dt_k = gradient(dt, call.teacher.gradient_stride, k);
      row.counted[k] = one_row(first + k, k, last, down(logits, k), ds_k, dt_k, student, teacher, row);
      if (row.counted[k]) continue;
      if (ds) memset((void*)ds_k, 0, C * sizeof(S));
      if (dt) memset((void*)dt_k, 0, C * sizeof(S));
    }
    finish();  // of places that no row of this group has taken
    for (int k = 0; k < n; k += lanes<double>) scalars(first, k, n, student, teacher, row, to_s, to_t);
    if (!ds && !dt) return;
    for (int k = 0; k < n; ++k) {
      Due& of = due[k];
      of.waits = row.counted[k], of.careful = row.careful[k], of.row = down(logits, k);
      of.ds = gradient(ds, call.student.gradient_stride, k), of.dt = gradient(dt, call.teacher.gradient_stride, k);
      of.label = row.label[k], of.max_s = student.max[k], of.max_t = teacher.max[k], of.made = 0;
      if (!common.sums_and_gradients) make_gradients(k);
    }
  }

  struct Scalars {  // of each row of a group, beside its sums
    using Each = double[kGroup];
    int64_t label[kGroup]{};
    bool careful[kGroup]{};
    Each counted{}, q{};              // 0: ignored; the sum of its target
    Each label_s{}, label_t{};        // the label's logit - max
    Each correct_s{}, correct_t{};
    Each weight{}, upstream_s{}, upstream_t{};
  };

  // Row k's maxima and sums; false where it is ignored. Makes the gradients due in its place meanwhile.
  bool one_row(int64_t number, int k, int64_t last, RowPair logits, const S* ds, const S* dt, NetworkSums& student,
               NetworkSums& teacher, Scalars& row) {
    int64_t label = labels ? ((const int64_t*)call.target)[number] : -1;
    if (labels && label == o.ignore_index) return false;
    const bool no_such_label = labels && (label < 0 || label >= C);
    if (no_such_label) label = 0;
    if (soft) label = soft_row<R>(call, number, q_of(k));
    const auto [s, t] = logits;

    if (streaming) {  // not to be fetched, but for the lines that a row shares with its neighbours
      for (const S* of : {ds, dt})
        if (of) __builtin_prefetch(of, 1), __builtin_prefetch(of + C - 1, 1);
      ds = dt = nullptr;
    }
    const bool together = due[k].waits && !due[k].careful;
    if (!together) make_gradients(k);
    const auto loop = together ? common.sums_and_gradients : common.sums;
    if (kept) {
      const Maxima max = maxima(logits, C);
      student.max[k] = max.s, teacher.max[k] = max.t;
      const RowPair next = number + 1 < last ? down(logits, 1) : RowPair{};
      (this->*loop)({k, logits, 0, C, next, down(logits, rows_ahead) + classes_ahead, ds, dt}, student, teacher);
    } else {
      for (int64_t begin = 0; begin < C; begin += kChunk) {
        const int64_t end = begin + kChunk < C ? begin + kChunk : C;
        const Maxima max = maxima(logits + begin, end - begin);
        raise(k, max.s, max.t, student, teacher);
        const RowPair next = end + kChunk <= C ? logits + end : RowPair{};
        (this->*loop)({k, logits, begin, end, next, logits + (begin + 2 * kChunk), ds, dt}, student, teacher);
      }
    }
    make_gradients(k);  // what is left of them
    // A class masked by -inf, or inf or NaN, shows as a NaN here: 0 * inf needs the careful path.
    bool& careful = row.careful[k] = false;
    for (const NetworkSums* of : {&student, &teacher})
      careful |= !std::isfinite(of->z1[k] + of->xz[k] + of->xz1[k] + of->gap[k]);
    if (careful) {
      student.clear(k), teacher.clear(k);
      student.max[k] = row_max<R>(s, C), teacher.max[k] = row_max<R>(t, C);
      sums<kRare, false>({k, logits, 0, C, {}, logits, nullptr, nullptr, true}, student, teacher);
    }
    if (power == 1) {
      student.z1[k] = student.z[k], teacher.z1[k] = teacher.z[k];
      student.xz1[k] = student.xz[k], teacher.xz1[k] = teacher.xz[k];
    }
    if (label >= 0) {
      const double max_s = student.max[k], max_t = teacher.max[k];
      row.label_s[k] = value(s[label]) - max_s, row.label_t[k] = value(t[label]) - max_t;
      const auto correct = [&](const S* x, double label_x, double max) {
        if (label_x != 0) return false;
        const bool tiny = std::fabs(max) < (double)std::numeric_limits<R>::min();
        return tiny ? is_first_by_bits(x, label, C) : is_first<R>(x, label, max);
      };
      row.correct_s[k] = correct(s, row.label_s[k], max_s), row.correct_t[k] = correct(t, row.label_t[k], max_t);
    }
    if (student_ce && (soft || smooth)) target_sums(s, k, student);
    if (teacher_ce && (soft || smooth)) target_sums(t, k, teacher);

    row.label[k] = label;
    row.q[k] = soft ? (student_ce ? student.q[k] : teacher.q[k]) : 1;
    if (no_such_label) row.q[k] = row.label_s[k] = row.label_t[k] = NAN;
    row.weight[k] = call.weight ? (double)((const R*)call.weight)[number] : 1;
    row.upstream_s[k] = upstream(call.student, number);
    row.upstream_t[k] = upstream(call.teacher, number);
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
      if (!smooth) return loss;
      // At a smoothing of 1 the label has no part of its own, also where it is masked.
      const W own = smoothing < 1 ? (1 - smoothing) * loss : W{};
      return own + smoothing * (log_z1 - of(sums.x) / (double)C);
    };
    W ce_s{}, ce_t{};
    if (student_ce) ce_s = cross_entropy(student, of(row.label_s), log_z1s);
    if (teacher_ce) ce_t = cross_entropy(teacher, of(row.label_t), log_z1t);

    W entropy_s{}, entropy_t{}, d1{}, d2{}, forward{}, reverse{}, log_zt_over_zs{};
    W per_zs = per_z1s, per_zt = per_z1t, log_zs = log_z1s, log_zt = log_z1t;
    if (kd) {
      if (power != 1) {
        per_zs = 1 / of(student.z), per_zt = 1 / of(teacher.z);
        log_zs = log_of<W>(of(student.z)), log_zt = log_of<W>(of(teacher.z));
      }
      // Near distributions: the sums' own roundings, 1e-7 of each, would drown their divergence.
      const W change = of(teacher.z_gap) * per_zs;
      log_zt_over_zs = (change < 0.25) & (change > -0.25) ? log1p_near_0<W>(change) : log_zt - log_zs;
      if (plain_entropy) {
        entropy_s = log_z1s - of(student.xz1) * per_z1s, entropy_t = log_z1t - of(teacher.xz1) * per_z1t;
      } else {
        entropy_s = log_zs - of(student.xz) * per_zs / tau, entropy_t = log_zt - of(teacher.xz) * per_zt / tau;
      }
      d1 = entropy_t > entropy_s ? W{} + o.gamma : one, d2 = entropy_s > entropy_t ? W{} + o.gamma : one;
      forward = of(teacher.gap) * per_zt / tau - log_zt_over_zs;
      reverse = log_zt_over_zs - of(student.gap) * per_zs / tau;
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
    // A NaN of either network reaches every class, also those whose e is 0. (Sums are finite or NaN.)
    const W poison = kd ? 0 * (of(student.z) + of(teacher.z)) : W{};
    if (call.student.gradient) {
      const W scale = weight * call.row_scale * of(row.upstream_s), kd_scale = scale * o.student_kd * tau;
      put(to_s.gap, -kd_scale * d2 / tau * per_zs);
      put(to_s.offset, kd_scale * (d1 + d2 * (log_zt_over_zs - reverse)) * per_zs);
      put(to_s.partner, kd_scale * d1 * per_zt + poison);
      if (student_ce) to_target(to_s, scale * o.student_ce, per_z1s);
    }
    if (call.teacher.gradient) {
      const W scale = weight * call.row_scale * of(row.upstream_t), kd_scale = scale * o.teacher_kd * tau;
      put(to_t.gap, teacher_forward ? kd_scale / tau * per_zt : W{});
      put(to_t.offset, kd_scale * (teacher_forward ? -log_zt_over_zs - forward : one) * per_zt);
      put(to_t.partner, (teacher_forward ? W{} : kd_scale * per_zs) + poison);
      if (teacher_ce) to_target(to_t, scale * o.teacher_ce, per_z1t);
    }

    const auto write = [&](auto* rows, W value) INLINE_LAMBDA {
      using T = std::decay_t<decltype(*rows)>;
      const auto narrow = __builtin_convertvector(counted != 0 ? value : W{}, Vec<T, D>);
      if (n - k >= D) memcpy((void*)(rows + first + k), &narrow, sizeof narrow);
      else memcpy((void*)(rows + first + k), &narrow, sizeof(T) * (n - k));
    };
    if (call.statistics) {
      const W z1s = of(student.z1), z1t = of(teacher.z1);
      const W stats[kStatistics] = {forward, reverse, entropy_s, entropy_t, ce_s, ce_t, d1, d2, per_z1s, per_z1t,
                               z1s == z1s ? of(row.correct_s) : W{}, z1t == z1t ? of(row.correct_t) : W{}};
      for (int stat = 0; stat < kStatistics; ++stat) write((R*)call.statistics + stat * call.rows, stats[stat]);
    }
    if (call.row_loss.student) {
      W student_loss{}, teacher_loss{};
      if (o.student_kd != 0) student_loss += o.student_kd * tau * tau * (d1 * forward + d2 * reverse);
      if (o.teacher_kd != 0) teacher_loss += o.teacher_kd * tau * tau * (teacher_forward ? forward : reverse);
      if (student_ce) student_loss += o.student_ce * ce_s;
      if (teacher_ce) teacher_loss += o.teacher_ce * ce_t;
      write(call.row_loss.student, weight * student_loss);
      write(call.row_loss.teacher, weight * teacher_loss);
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

struct Share {  // one after the other, of one thread
  WorkQueue& all;
  int64_t from = __atomic_fetch_add(&all.threads_started, 1, __ATOMIC_RELAXED) % all.range_count;  // this range
  int64_t left = all.range_count;  // ranges that may hold some
  int64_t begin{}, end{}, last{};  // rows; `last` ends their range

  bool next() {
    for (; left; --left, from = (from + 1) % all.range_count) {
      WorkQueue::Range& range = all.ranges[from];
      begin = __atomic_fetch_add(&range.next, all.block_rows, __ATOMIC_RELAXED), last = range.end;
      end = begin + all.block_rows < last ? begin + all.block_rows : last;
      if (begin < last) return true;
    }
    return false;
  }
};

template <class S>
void run(const Call& call, WorkQueue& shares) {
  const Subnormals are_zero;
  Rows<S> rows{call};
  const auto &s = call.student, &t = call.teacher;
  for (Share share{shares}; share.next();)
    for (int64_t row = share.begin; row < share.end; row += rows.group)
      rows(row, share.end - row < rows.group ? share.end - row : rows.group, share.last,
           {(const S*)s.logits + row * s.stride, (const S*)t.logits + row * t.stride},
           s.gradient ? (S*)s.gradient + row * s.gradient_stride : nullptr,
           t.gradient ? (S*)t.gradient + row * t.gradient_stride : nullptr);
  rows.finish();
}

// Two storage types: each row goes through a copy in the compute type.
template <class R>
void run_mixed(const Call& mixed, WorkQueue& shares) {
  Call call = mixed;
  call.nontemporal = false;
  Rows<R> one_row{call};
  const int64_t padded = one_row.padded;
  const std::unique_ptr<R[]> memory(new R[2 * padded]);
  R *const a = memory.get(), *const b = a + padded;
  const auto &s = call.student, &t = call.teacher;
  for (Share share{shares}; share.next();)
    for (int64_t row = share.begin; row < share.end; ++row) {
      widen<R>(s.storage, s.logits, row * s.stride, call.classes, a);
      widen<R>(t.storage, t.logits, row * t.stride, call.classes, b);  // float32's subnormals are float64's numbers
      {
        const Subnormals are_zero;
        one_row(row, 1, row + 1, {a, b}, s.gradient ? a : nullptr, t.gradient ? b : nullptr);
        one_row.finish();
      }
      if (s.gradient) narrow<R>(s.storage, a, call.classes, s.gradient, row * s.gradient_stride);
      if (t.gradient) narrow<R>(t.storage, b, call.classes, t.gradient, row * t.gradient_stride);
    }
}

}  // namespace

extern const RowKernels kernels;
const RowKernels kernels = {{run<float>, run<double>, run<Half>, run<BFloat>}, run_mixed<float>, run_mixed<double>};

}  // namespace BDKD_ISA
