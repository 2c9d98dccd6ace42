// Vectors of one machine width by the compiler's vector extensions; intrinsics only where it has no
// word for them (half precision, stores past the cache).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define BDKD_BYTES 64
#elif defined(__AVX2__)
#define BDKD_BYTES 32
#else
#define BDKD_BYTES 16
#endif
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))

// Every instruction set compiles this file into a namespace of its own: one inlined copy that the
// linker kept for all would be an illegal instruction on the smaller machines.
namespace BDKD_ISA {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VectorOf<T, N>::type;

template <class R>
constexpr int lanes = BDKD_BYTES / sizeof(R);

struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

template <class To, class From>
INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
INLINE V loaded(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

// ---- N values of a storage type to and from float --------------------------------------------

template <int N>
INLINE Vec<float, N> to_float(Vec<uint16_t, N> h, BFloat) {
#if defined(__AVX512BW__)
  if constexpr (N == 16) {  // one instruction for two
    static constexpr uint16_t kOdd[32] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
                                          0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i words = _mm512_castsi256_si512(bits_as<__m256i>(h));
    return bits_as<Vec<float, N>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, loaded<__m512i>(kOdd), words));
  }
#endif
  return bits_as<Vec<float, N>>(__builtin_convertvector(h, Vec<uint32_t, N>) << 16);
}

template <int N>
INLINE Vec<uint16_t, N> from_float(Vec<float, N> x, BFloat) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) return bits_as<Vec<uint16_t, N>>(_mm512_cvtneps_pbh(x));
#endif
  using U = Vec<uint32_t, N>;
  U u = bits_as<U>(x);
  u += 0x7fff + ((u >> 16) & 1);                              // to nearest, ties to even
  u = x == x ? u : U{} + 0x7fc00000;                          // a NaN's payload must not carry over
  return __builtin_convertvector(u >> 16, Vec<uint16_t, N>);
}

template <int N>
INLINE Vec<float, N> to_float(Vec<uint16_t, N> h, Half) {
#if defined(__AVX512F__)
  if constexpr (N == 16) return _mm512_cvtph_ps(bits_as<__m256i>(h));
#endif
#if defined(__F16C__)
  if constexpr (N == 8) return _mm256_cvtph_ps(bits_as<__m128i>(h));
#endif
  using U = Vec<uint32_t, N>;
  using F = Vec<float, N>;
  U wide = __builtin_convertvector(h, U);
  U magnitude = (wide & 0x7fff) << 13, exponent = magnitude & 0x0f800000;
  U normal = magnitude + ((127u - 15u) << 23);
  F subnormal = bits_as<F>(normal + (1u << 23)) - 0x1p-14f;
  U u = exponent == 0x0f800000 ? normal + ((128u - 16u) << 23) : normal;  // inf, NaN
  u = exponent == 0 ? bits_as<U>(subnormal) : u;
  return bits_as<F>(u | (wide & 0x8000) << 16);
}

template <int N>
INLINE Vec<uint16_t, N> from_float(Vec<float, N> x, Half) {
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return bits_as<Vec<uint16_t, N>>(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#endif
#if defined(__F16C__)
  if constexpr (N == 8)
    return bits_as<Vec<uint16_t, N>>(_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
#endif
  using U = Vec<uint32_t, N>;
  using F = Vec<float, N>;
  U u = bits_as<U>(x), sign = u & 0x80000000u;
  u ^= sign;
  U large = u > 0x7f800000u ? U{} + 0x7e00u : U{} + 0x7c00u;  // NaN, inf
  U small = bits_as<U>(bits_as<F>(u) + 0.5f) - 0x3f000000u;   // the adder rounds to 2^-24
  U normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1)) >> 13;
  u = u >= 0x47800000u ? large : (u < 0x38800000u ? small : normal);
  return __builtin_convertvector(u | sign >> 16, Vec<uint16_t, N>);
}

// ---- N values of a storage type to and from the compute type ---------------------------------

template <class S>
using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, S>;

template <class R, class S, int N = lanes<R>>
INLINE Vec<R, N> widened(Vec<Bits<S>, N> v) {
  if constexpr (sizeof(S) == 2) return __builtin_convertvector(to_float<N>(v, S{}), Vec<R, N>);
  else return __builtin_convertvector(v, Vec<R, N>);
}
template <class R, class S, int N = lanes<R>>
INLINE Vec<Bits<S>, N> narrowed(Vec<R, N> v) {
  if constexpr (sizeof(S) == 2) return from_float<N>(__builtin_convertvector(v, Vec<float, N>), S{});
  else return __builtin_convertvector(v, Vec<S, N>);
}

template <class R, class S>
INLINE Vec<R, lanes<R>> load(const S* p) {
  return widened<R, S>(loaded<Vec<Bits<S>, lanes<R>>>(p));
}
template <class R, class S>
INLINE void store(S* p, Vec<R, lanes<R>> v) {
  const auto bits = narrowed<R, S>(v);
  memcpy((void*)p, &bits, sizeof bits);
}

// `p` is a multiple of the vector's size.
template <class R, class S>
INLINE void store_past_the_cache(S* p, Vec<R, lanes<R>> v) {
  const auto bits = narrowed<R, S>(v);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_si512((__m512i*)p, bits_as<__m512i>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256((__m256i*)p, bits_as<__m256i>(bits));
#endif
  memcpy((void*)p, &bits, sizeof bits);
}

// The first n < lanes values, the rest 0; nothing past them is touched.
template <class R, class S>
INLINE Vec<R, lanes<R>> load_some(const S* p, int64_t n) {
  using B = Vec<Bits<S>, lanes<R>>;
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof(B) == 64 && sizeof(S) == 4)
    return widened<R, S>(bits_as<B>(_mm512_maskz_loadu_epi32(mask, p)));
  if constexpr (sizeof(B) == 64 && sizeof(S) == 8)
    return widened<R, S>(bits_as<B>(_mm512_maskz_loadu_epi64(mask, p)));
  if constexpr (sizeof(B) == 32 && sizeof(S) == 2)
    return widened<R, S>(bits_as<B>(_mm256_maskz_loadu_epi16(mask, p)));
#endif
  Bits<S> some[lanes<R>] = {};
  for (int64_t i = 0; i < n; ++i) memcpy(some + i, p + i, sizeof(S));
  return widened<R, S>(loaded<B>(some));
}
template <class R, class S>
INLINE void store_some(S* p, Vec<R, lanes<R>> v, int64_t n) {
  const auto bits = narrowed<R, S>(v);
#if defined(__AVX512F__)
  const uint32_t mask = (1u << n) - 1;
  if constexpr (sizeof bits == 64 && sizeof(S) == 4)
    return _mm512_mask_storeu_epi32(p, mask, bits_as<__m512i>(bits));
  if constexpr (sizeof bits == 64 && sizeof(S) == 8)
    return _mm512_mask_storeu_epi64(p, mask, bits_as<__m512i>(bits));
  if constexpr (sizeof bits == 32 && sizeof(S) == 2)
    return _mm256_mask_storeu_epi16(p, mask, bits_as<__m256i>(bits));
#endif
  for (int64_t i = 0; i < n; ++i) memcpy((void*)(p + i), (const char*)&bits + i * sizeof(S), sizeof(S));
}

// ---- arithmetic --------------------------------------------------------------------------------

// The larger, or b where b is NaN.
template <class V>
INLINE V larger(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 4) return (V)_mm512_max_ps((__m512)a, (__m512)b);
  if constexpr (sizeof(V) == 64 && sizeof(a[0]) == 8) return (V)_mm512_max_pd((__m512d)a, (__m512d)b);
#endif
  return a > b ? a : b;
}

// a b + c, rounded once where the machine can. Of a sum of two products the compiler rounds now one, now
// the other: where two loops must agree to the bit, this says which.
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
constexpr float kExp2<float>[] = {  // (2^r - 1) / r on [-1/2, 1/2]: 9.2e-8 off at most in 2^r
    0.693146977587f, 0.240222420776f, 0.0555073376039f, 0.00967151299704f, 0.00132647220462f};
template <>
constexpr double kExp2<double>[] = {  // 5.9e-16
    0.693147180559946159, 0.240226506959100761, 0.055504108664651672, 0.00961812910761866557,
    0.00133335582007945926, 0.000154035304247765276, 0.0000152526729248507364,
    1.32154516332214344e-6, 1.02059054137655958e-7, 7.07097786650813856e-9};

#if defined(__AVX512F__)
// 2^(k/32): with two registers of them the polynomial needs two terms, three instructions less.
alignas(64) constexpr float kRootsOf2[32] = {
    1.0f, 1.0218972f, 1.04427373f, 1.06714046f, 1.09050775f, 1.1143868f, 1.13878858f, 1.1637249f,
    1.18920708f, 1.21524739f, 1.24185777f, 1.26905096f, 1.29683959f, 1.32523668f, 1.35425556f, 1.38390994f,
    1.41421354f, 1.44518077f, 1.47682619f, 1.50916445f, 1.54221082f, 1.5759809f, 1.61049032f, 1.64575553f,
    1.68179286f, 1.71861935f, 1.75625217f, 1.79470909f, 1.8340081f, 1.87416768f, 1.91520655f, 1.95714414f};
#endif

// 2^(x c) for x <= 0 and a c > 0: 1 at 0, 0 below the normal range, NaN where x is NaN. With AVX-512
// NaN also where x c overflows, and for x = -inf: who may meet those gives a floor to x.
template <class R>
INLINE Vec<R, lanes<R>> exp2_of(Vec<R, lanes<R>> x, Vec<R, lanes<R>> c) {
  using V = Vec<R, lanes<R>>;
  constexpr bool single = sizeof(R) == 4;
#if defined(__AVX512F__)
  if constexpr (single) {
    constexpr float rounder = 0x1.8p18f;  // to multiples of 1/32, whose number mod 32 ends the bits
    const V shifted = multiply_add<V>(x, c, V{} + rounder), n = shifted - rounder, r = multiply_add<V>(x, c, -n);
    const V root = _mm512_permutex2var_ps(_mm512_load_ps(kRootsOf2), (__m512i)shifted,
                                          _mm512_load_ps(kRootsOf2 + 16));
    const V slope = multiply_add<V>(r, V{} + 0.240228651f, V{} + 0.693159543f);
    return _mm512_scalef_ps(multiply_add<V>(r * root, slope, root), n);  // 5e-8 off at most
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

// ln(1 + f) for f within [sqrt(1/2) - 1, sqrt(2) - 1], fdlibm's series of s = f / (2 + f).
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

// ln x of doubles x >= 1, within a unit in the last place; NaN where x is NaN.
template <class V>
INLINE V log_of(V x) {
  using U = Vec<uint64_t, sizeof(V) / 8>;
  constexpr uint64_t kRootHalf = 0x3fe6a09e667f3bcd, kOne52 = 0x4330000000000000;
  const U power = (bits_as<U>(x) - kRootHalf) >> 52;  // so that x / 2^power is in [sqrt(1/2), sqrt(2))
  const V k = bits_as<V>(power | kOne52) - 0x1p52;
  const V near = log1p_near_0<V>(bits_as<V>(bits_as<U>(x) - (power << 52)) - 1);
  const V log = k * 6.93147180369123816490e-01 + (near + k * 1.90821492927058770002e-10);
  return x < INFINITY ? log : x;
}

template <class V>
INLINE double sum(V v) {  // of a vector of doubles, in pairs
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
INLINE auto lane_max(V v) {  // of lanes that are numbers
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
