// Arithmetic on vectors: exp2, log, reductions.
#pragma once
#include "simd.h"

namespace BDKD_ISA {

// Returns the larger value, or b if a or b is NaN.
template <class V>
INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 8) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
  return a > b ? a : b;
}

// Returns a b + c, rounded once if the machine can. In a sum of two products, the compiler chooses the
// product that it fuses, and its choice can differ between loops. Use this function if two loops must
// give the same bits.
template <class V>
INLINE V multiply_add(V a, V b, V c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 8) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#endif
  return a * b + c;
}

template <class R>
constexpr R kExp2[] = {};
template <>
constexpr float kExp2<float>[] = {  // (2^r - 1) / r on [-1/2, 1/2]; error of 2^r at most 9.2e-8
    0.693146977587f, 0.240222420776f, 0.0555073376039f, 0.00967151299704f, 0.00132647220462f};
template <>
constexpr double kExp2<double>[] = {  // error at most 5.9e-16
    0.693147180559946159, 0.240226506959100761, 0.055504108664651672, 0.00961812910761866557,
    0.00133335582007945926, 0.000154035304247765276, 0.0000152526729248507364,
    1.32154516332214344e-6, 1.02059054137655958e-7, 7.07097786650813856e-9};

#if defined(__AVX512F__)
// 2^(k/32) in two registers. With this table, the polynomial needs two terms, which saves three instructions.
alignas(64) constexpr float kRootsOf2[32] = {
    1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};
#endif

// Returns 2^(x c) for x <= 0 and c > 0. The result is 1 at x = 0, 0 below the normal range, and NaN if x
// is NaN. With AVX-512 the result is also NaN if x c overflows or x is -inf. Callers with such inputs
// limit x from below.
template <class R>
INLINE Vec<R, lanes<R>> exp2_of(Vec<R, lanes<R>> x, Vec<R, lanes<R>> c) {
  using V = Vec<R, lanes<R>>;
  constexpr bool single = sizeof(R) == 4;
#if defined(__AVX512F__)
  if constexpr (single) {
    constexpr float rounder = 0x1.8p18f;  // rounds to multiples of 1/32; the last 5 bits index the roots
    const V shifted = multiply_add<V>(x, c, V{} + rounder), n = shifted - rounder, r = multiply_add<V>(x, c, -n);
    const V root = _mm512_permutex2var_ps(_mm512_load_ps(kRootsOf2), (__m512i)shifted,
                                          _mm512_load_ps(kRootsOf2 + 16));
    const V slope = multiply_add<V>(r, V{} + 0.240228651f, V{} + 0.693159543f);
    return _mm512_scalef_ps(multiply_add<V>(r * root, slope, root), n);  // error at most 5e-8
  }
#endif
  using U = Vec<std::conditional_t<single, uint32_t, uint64_t>, lanes<R>>;
  constexpr R lowest = single ? -127 : -1023, rounder = single ? 0x1.8p23 : 0x1.8p52;
  const V a = larger<V>(V{} + lowest, x * c);
  const V shifted = a + rounder;  // its low bits are the nearest integer
  const V r = a - (shifted - rounder);
  constexpr int n = sizeof(kExp2<R>) / sizeof(R);
  V power = V{} + kExp2<R>[n - 1];
  for (int k = n - 2; k >= 0; --k) power = power * r + kExp2<R>[k];
  power = power * r + 1;
  return bits_as<V>(bits_as<U>(power) + (bits_as<U>(shifted) << (single ? 23 : 52)));
}

// Returns ln(1 + f) for f in [sqrt(1/2) - 1, sqrt(2) - 1]: fdlibm's series in s = f / (2 + f).
template <class V>
INLINE V log1p_near_0(V f) {
  constexpr double kSeries[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                6.666666666666735130e-01};
  const V s = f / (f + 2), z = s * s, half = f * f * 0.5;
  V series = V{} + kSeries[0];
  for (int k = 1; k < 7; ++k) series = series * z + kSeries[k];
  return f - (half - s * (half + series * z));
}

// Returns ln x of doubles x >= 1, within one unit in the last place; NaN if x is NaN.
template <class V>
INLINE V log_of(V x) {
  using U = Vec<uint64_t, sizeof(V) / 8>;
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd, kOne52 = 0x4330000000000000;
  const U power = (bits_as<U>(x) - kRootHalf) >> 52;  // x / 2^power is in [sqrt(1/2), sqrt(2))
  const V k = bits_as<V>(power | kOne52) - 0x1p52;
  const V near = log1p_near_0<V>(bits_as<V>(bits_as<U>(x) - (power << 52)) - 1);
  const V log = k * 6.93147180369123816490e-01 + (near + k * 1.90821492927058770002e-10);
  return x < INFINITY ? log : x;
}

// ---- reductions of a vector's lanes ------------------------------------------------------------

template <class V>
INLINE double sum(V v) {  // a vector of doubles, added pairwise
  constexpr int N = sizeof v / sizeof(double);
  if constexpr (N == 2) {
    return v[0] + v[1];
  } else {
    Vec<double, N / 2> half[2];
    memcpy(half, &v, sizeof v);
    return sum(half[0] + half[1]);
  }
}
template <class R>
INLINE double lane_sum(Vec<R, lanes<R>> v) {
  return sum(__builtin_convertvector(v, Vec<double, lanes<R>>));
}
template <class V>
INLINE bool any(V mask) {
  int64_t words[sizeof mask / 8], bits = 0;
  memcpy(words, &mask, sizeof mask);
  for (int64_t word : words) bits |= word;
  return bits != 0;
}
template <class V>
INLINE auto lane_max(V v) {  // no lane may be NaN
  using R = std::decay_t<decltype(v[0])>;
  constexpr int N = sizeof v / sizeof(R);
  if constexpr (N == 2) {
    return v[0] > v[1] ? v[0] : v[1];
  } else {
    Vec<R, N / 2> half[2];
    memcpy(half, &v, sizeof v);
    return lane_max(half[0] > half[1] ? half[0] : half[1]);
  }
}

}  // namespace BDKD_ISA
