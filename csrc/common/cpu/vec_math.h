// exp, expm1, log1p and tanh on vectors of float or double; of NaN they are NaN. Taylor series after range
// reduction: the polynomial part has an error below 1 ulp in both precisions.
#pragma once

#include "common/cpu/vec.h"

namespace minitron::MINITRON_SIMD {

template <typename A>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr int degree = 7, mantissa = 23, bias = 127;
  static constexpr float magic = 0x1.8p23f, ln2_hi = 0x1.62ep-1f, ln2_lo = 0x1.0bfbe8p-15f, lowest = -87.33f;
};
template <>
struct ExpConstants<double> {
  static constexpr int degree = 13, mantissa = 52, bias = 1023;
  static constexpr double magic = 0x1.8p52, ln2_hi = 0x1.62e42fefap-1, ln2_lo = 0x1.cf79abc9e3b3ap-40,
                          lowest = -708.3;
};

// x = n ln2 + r, |r| <= ln2/2. Returns e^r - 1 and 2^n, for lowest <= x <= 0 and a little above.
template <typename A>
inline void exp_parts(Vec<A> x, Vec<A>* em1, Vec<A>* power) {
  using C = ExpConstants<A>;
  const Vec<A> shifted = x * A(1.4426950408889634) + C::magic;  // rounds to nearest into the low bits
  const Vec<A> n = shifted - C::magic;
  const Vec<A> r = (x - n * C::ln2_hi) - n * C::ln2_lo;
  A coefficient = 1;
  for (int k = 2; k <= C::degree; ++k) coefficient /= k;
  Vec<A> p = splat(coefficient);
#pragma GCC unroll 16
  for (int k = C::degree; k > 1; --k) {
    coefficient *= k;
    p = p * r + coefficient;
  }
  *em1 = p * r;
  const auto bits = bit_cast<Mask<A>>(shifted) - bit_cast<Mask<A>>(splat(C::magic));
  *power = bit_cast<Vec<A>>((bits + C::bias) << C::mantissa);
}

// e^x for x <= 0 (and a little above); results below the smallest normal number are 0.
template <typename A>
inline Vec<A> exp_nonpositive(Vec<A> x) {
  Vec<A> em1, power;
  exp_parts<A>(x, &em1, &power);
  const Vec<A> y = em1 * power + power;
  return x < ExpConstants<A>::lowest ? Vec<A>{} : y;
}

// e^x - 1 for x <= 0, relative error of a few ulps also where x is near 0.
template <typename A>
inline Vec<A> expm1_nonpositive(Vec<A> x) {
  Vec<A> em1, power;
  exp_parts<A>(x, &em1, &power);
  const Vec<A> y = em1 * power + (power - A(1));
  return x < ExpConstants<A>::lowest ? splat(A(-1)) : y;
}

// log(1 + u) for u >= -1. w = 1 + u is given too: near w = 0 it has digits that u has lost.
template <typename A>
inline Vec<A> log1p_of(Vec<A> u, Vec<A> w) {
  using C = ExpConstants<A>;
  const auto bits = bit_cast<Mask<A>>(w);
  // w = 2^k f with sqrt(1/2) <= f < sqrt(2)
  const A sqrt_half = A(0.70710678118654752440);
  const auto offset = bits - bit_cast<Mask<A>>(splat(sqrt_half));
  const auto k_bits = offset >> C::mantissa;  // arithmetic shift
  const Vec<A> k = __builtin_convertvector(k_bits, Vec<A>);
  const Vec<A> f = bit_cast<Vec<A>>(bits - (k_bits << C::mantissa));
  // near u = 0 the rounding of 1 + u would be an error, so u itself is used
  const Vec<A> top = k == A(0) ? u : f - A(1);
  const Vec<A> s = top / (top + A(2)), s2 = s * s;
  // s2 < 0.0295: the last term adds less than a tenth of half an ulp, which no test can see
  constexpr int kTerms = sizeof(A) == 4 ? 5 : 11;
  Vec<A> series = splat(A(1) / (2 * kTerms + 1));
#pragma GCC unroll 16
  for (int i = kTerms - 1; i >= 0; --i) series = series * s2 + A(1) / (2 * i + 1);
  const Vec<A> log_f = A(2) * s * series;
  const Vec<A> y = k * C::ln2_hi + (k * C::ln2_lo + log_f);
  return w == A(0) ? splat(-std::numeric_limits<A>::infinity()) : y;
}

template <typename A>
inline Vec<A> tanh_of(Vec<A> x) {
  const Vec<A> magnitude = x < A(0) ? -x : x;
  const Vec<A> e = expm1_nonpositive<A>(magnitude * A(-2));
  const Vec<A> y = -e / (e + A(2));
  return x < A(0) ? -y : y;
}

}  // namespace minitron::MINITRON_SIMD
