// Vectors as wide as the machine's registers, and their loads and stores. The code uses the compiler's
// vector extensions. It uses intrinsics only for operations that these do not cover: half precision,
// masked loads and stores, non-temporal stores.
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

// Each instruction set compiles this file into its own namespace. In a common namespace, the linker
// would keep one copy of a function for all instruction sets, which older machines cannot execute.
namespace BDKD_ISA {

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * N)));
};
template <class T, int N>
using Vec = typename VectorOf<T, N>::type;

template <class R>
constexpr int lanes = BDKD_BYTES / sizeof(R);

template <class R>
using Mask = Vec<std::conditional_t<sizeof(R) == 4, int32_t, int64_t>, lanes<R>>;  // a lane is 0 or -1

struct Half { uint16_t bits; };
struct Bfloat { uint16_t bits; };

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

// ---- conversion of N values between a 2-byte type and float -----------------------------------

template <int N>
INLINE Vec<float, N> to_float(Vec<uint16_t, N> h, Bfloat) {
#if defined(__AVX512BW__)
  if constexpr (N == 16) {  // one instruction instead of two
    static constexpr uint16_t kOdd[32] = {0, 0, 0, 1, 0, 2, 0, 3, 0, 4, 0, 5, 0, 6, 0, 7,
                                          0, 8, 0, 9, 0, 10, 0, 11, 0, 12, 0, 13, 0, 14, 0, 15};
    const __m512i words = _mm512_castsi256_si512(bits_as<__m256i>(h));
    return bits_as<Vec<float, N>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, loaded<__m512i>(kOdd), words));
  }
#endif
  return bits_as<Vec<float, N>>(__builtin_convertvector(h, Vec<uint32_t, N>) << 16);
}

template <int N>
INLINE Vec<uint16_t, N> from_float(Vec<float, N> x, Bfloat) {
#if defined(__AVX512BF16__)
  if constexpr (N == 16) return bits_as<Vec<uint16_t, N>>(_mm512_cvtneps_pbh(x));
#endif
  using U = Vec<uint32_t, N>;
  U u = bits_as<U>(x);
  u += 0x7fff + ((u >> 16) & 1);      // rounds to nearest, ties to even
  u = x == x ? u : U{} + 0x7fc00000;  // the addition can carry a NaN's payload into the exponent
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
  U small = bits_as<U>(bits_as<F>(u) + 0.5f) - 0x3f000000u;   // the addition rounds to multiples of 2^-24
  U normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1)) >> 13;
  u = u >= 0x47800000u ? large : (u < 0x38800000u ? small : normal);
  return __builtin_convertvector(u | sign >> 16, Vec<uint16_t, N>);
}

// ---- loads and stores of storage type S, values of compute type R ------------------------------

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

// Stores without writing to the caches. `p` must be aligned to the size of the stored vector.
template <class R, class S>
INLINE void store_nontemporal(S* p, Vec<R, lanes<R>> v) {
  const auto bits = narrowed<R, S>(v);
#if defined(__AVX512F__)
  if constexpr (sizeof bits == 64) return _mm512_stream_si512((__m512i*)p, bits_as<__m512i>(bits));
#endif
#if defined(__AVX2__)
  if constexpr (sizeof bits == 32) return _mm256_stream_si256((__m256i*)p, bits_as<__m256i>(bits));
#endif
  memcpy((void*)p, &bits, sizeof bits);
}

// Loads the first n < lanes values, and reads no memory after them. The other lanes are 0.
template <class R, class S>
INLINE Vec<R, lanes<R>> load_partial(const S* p, int64_t n) {
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
  Bits<S> values[lanes<R>] = {};
  for (int64_t i = 0; i < n; ++i) memcpy(values + i, p + i, sizeof(S));
  return widened<R, S>(loaded<B>(values));
}
template <class R, class S>
INLINE void store_partial(S* p, Vec<R, lanes<R>> v, int64_t n) {
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

// Loads classes i .. i + lanes of a row of `count`; lanes past the end are 0.
template <class R, class S>
INLINE Vec<R, lanes<R>> load_at(const S* row, int64_t i, int64_t count) {
  return i + lanes<R> <= count ? load<R>(row + i) : load_partial<R>(row + i, count - i);
}

template <class R>
INLINE Mask<R> first_lanes(int64_t n) {  // -1 in lanes below n
  using I = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  static constexpr struct { I ones[lanes<R>], zeros[lanes<R>]; } kMask = [] {
    std::remove_const_t<decltype(kMask)> mask{};
    for (I& one : mask.ones) one = -1;
    return mask;
  }();
  return loaded<Mask<R>>(kMask.zeros - n);
}

}  // namespace BDKD_ISA
