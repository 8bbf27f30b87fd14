/* exp, tanh and activations of 16 floats at once, to about one rounding. */

#ifndef VECTOR_MATH_H
#define VECTOR_MATH_H

#include <math.h>

#include "affine_registers.h"

INLINE Floats all(float value) {
  Floats out;
  UNROLL for (int i = 0; i < PARTS; i++) out.v[i] = (vf){0} + value;
  return out;
}

INLINE vf choose(vi where, vf yes, vf no) { return (vf)((where & (vi)yes) | (~where & (vi)no)); }

INLINE Floats largest_of(Floats a, Floats b) {
  UNROLL for (int i = 0; i < PARTS; i++) a.v[i] = choose(a.v[i] > b.v[i], a.v[i], b.v[i]);
  return a;
}

INLINE float sum_of(Floats a) {
  float lanes[LANES], total = 0;
  store(lanes, a);
  UNROLL for (int i = 0; i < LANES / 2; i++) lanes[i] += lanes[i + LANES / 2];
  UNROLL for (int i = 0; i < LANES / 4; i++) lanes[i] += lanes[i + LANES / 4];
  UNROLL for (int i = 0; i < LANES / 4; i++) total += lanes[i];
  return total;
}

INLINE float highest_of(Floats a) {
  float lanes[LANES], highest;
  store(lanes, a);
  highest = lanes[0];
  UNROLL for (int i = 1; i < LANES; i++) highest = lanes[i] > highest ? lanes[i] : highest;
  return highest;
}

/* e^x = 2^n e^r with |r| <= ln(2) / 2 and a polynomial for e^r (Cody and Waite 1980, ch. 6);
   zero below -87, where e^x leaves the normal numbers. */
INLINE vf exp_part(vf x) {
  const vf top = {0}, shift = top + 12582912.0f;
  const vf bounded = choose(x > top + 88.7f, top + 88.7f, x);
  const vf n = (bounded * 1.44269504f + shift) - shift;
  const vf r = (bounded - n * 0.693359375f) - n * -2.12194440e-4f;
  vf p = top + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi power = __builtin_convertvector(n, vi);
  const vi half = power >> 1; /* in two factors: 2^128 is no float */
  const vf one = (vf)((half + 127) << 23), two = (vf)((power - half + 127) << 23);
  return choose(x < top - 87.0f, top, p * one * two);
}

/* 1 - 2 / (e^2x + 1), and an odd polynomial near zero, where that cancels (Moshier, Cephes). */
INLINE vf tanh_part(vf x) {
  const vf none = {0};
  const vf size = (vf)((vi)x & 0x7fffffff), z = x * x;
  const vf far = 1.0f - 2.0f / (exp_part(size + size) + 1.0f);
  vf p = none - 5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vf near = p * z * x + x;
  const vf sign = (vf)((vi)x & (int)0x80000000);
  return choose(size < none + 0.625f, near, (vf)((vi)far | (vi)sign));
}

INLINE Floats exponential(Floats x) {
  UNROLL for (int i = 0; i < PARTS; i++) x.v[i] = exp_part(x.v[i]);
  return x;
}

/* softcap * tanh(x / softcap) */
INLINE Floats capped(Floats x, float cap) {
  UNROLL for (int i = 0; i < PARTS; i++) x.v[i] = tanh_part(x.v[i] / cap) * cap;
  return x;
}

enum { SILU, GELU, GELU_TANH, QUICK_GELU, RELU, SIGMOID };

INLINE vf sigmoid_part(vf x) { return 1.0f / (exp_part(-x) + 1.0f); }

INLINE Floats activated(Floats x, const int kind) {
  const vf none = {0};
  if (kind == GELU) {
    float lanes[LANES];
    store(lanes, x);
    for (int i = 0; i < LANES; i++)
      lanes[i] = 0.5f * lanes[i] * (1.0f + erff(lanes[i] * 0.70710678118f));
    return load(lanes);
  }
  UNROLL for (int i = 0; i < PARTS; i++) {
    const vf v = x.v[i];
    if (kind == SILU) x.v[i] = v * sigmoid_part(v);
    if (kind == GELU_TANH)
      x.v[i] = 0.5f * v * (1.0f + tanh_part(0.79788456f * (v + 0.044715f * v * v * v)));
    if (kind == QUICK_GELU) x.v[i] = v * sigmoid_part(1.702f * v);
    if (kind == RELU) x.v[i] = choose(v > none, v, none);
    if (kind == SIGMOID) x.v[i] = sigmoid_part(v);
  }
  return x;
}

/* The first `count` floats (at most 16), zeros after them. */
INLINE Floats load_some(const float *from, int64_t count) {
  if (count >= LANES) return load(from);
  float whole[LANES] = {0};
  memcpy(whole, from, count * sizeof(float));
  return load(whole);
}

INLINE void store_some(float *to, Floats value, int64_t count) {
  if (count >= LANES) {
    store(to, value);
  } else {
    float whole[LANES];
    store(whole, value);
    memcpy(to, whole, count * sizeof(float));
  }
}

#endif
