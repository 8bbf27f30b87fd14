/* Steps that compute every token on its own: norms, rotary embedding, gates, sums, copies. */

#ifndef ROW_STEPS_H
#define ROW_STEPS_H

#include "vector_math.h"

#define CHUNK 256 /* columns of one piece of work */

/* Sizes of a step on [tokens, heads, width] values; strides in floats. */
typedef struct {
  int64_t tokens, heads, width;
  int64_t token[4], head[4]; /* strides of operands 0, 1, 2 and of the result, 3 */
} Extent;

#define AT(pointer, place) ((pointer) + t * e->token[place] + h * e->head[place])

/* x / sqrt(mean(x^2) + eps) * (offset + weight) */
static void rms_norm_team(const Extent *e, const float *x, const float *weight, float *out,
                          float eps, float offset) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < e->tokens * e->heads; i++) {
    const int64_t t = i / e->heads, h = i % e->heads, n = e->width;
    const float *from = AT(x, 0);
    float *to = AT(out, 3);
    Floats squares = zeros();
    for (int64_t c = 0; c < n; c += LANES) {
      const Floats v = load_some(from + c, n - c);
      squares = multiply_add(v, v, squares);
    }
    const Floats factor = all(1.0f / sqrtf(sum_of(squares) / n + eps));
    for (int64_t c = 0; c < n; c += LANES) {
      Floats v = multiply(load_some(from + c, n - c), factor);
      if (weight) v = multiply(v, add(load_some(weight + c, n - c), all(offset)));
      store_some(to + c, v, n - c);
    }
  }
}

/* (x - mean) / sqrt(variance + eps) * weight + bias */
static void layer_norm_team(const Extent *e, const float *x, const float *weight,
                            const float *bias, float *out, float eps) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < e->tokens * e->heads; i++) {
    const int64_t t = i / e->heads, h = i % e->heads, n = e->width;
    const float *from = AT(x, 0);
    float *to = AT(out, 3);
    Floats sum = zeros(), squares = zeros();
    for (int64_t c = 0; c < n; c += LANES) sum = add(sum, load_some(from + c, n - c));
    const Floats mean = all(sum_of(sum) / n);
    for (int64_t c = 0; c < n; c += LANES) {
      Floats v = subtract(load_some(from + c, n - c), mean);
      if (n - c < LANES) {
        float whole[LANES];
        store(whole, v);
        v = load_some(whole, n - c);
      }
      squares = multiply_add(v, v, squares);
    }
    const Floats factor = all(1.0f / sqrtf(sum_of(squares) / n + eps));
    for (int64_t c = 0; c < n; c += LANES) {
      Floats v = multiply(subtract(load_some(from + c, n - c), mean), factor);
      if (weight) v = multiply(v, load_some(weight + c, n - c));
      if (bias) v = add(v, load_some(bias + c, n - c));
      store_some(to + c, v, n - c);
    }
  }
}

/* Pairs (i, i + half), or (2i, 2i + 1) when interleaved, turned by the angles of cos and sin. */
static void rotary_team(const Extent *e, const float *x, const float *cosine, const float *sine,
                        float *out, int64_t half, int64_t interleaved) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < e->tokens * e->heads; i++) {
    const int64_t t = i / e->heads, h = i % e->heads;
    const float *from = AT(x, 0), *cs = AT(cosine, 1), *sn = AT(sine, 2);
    float *to = AT(out, 3);
    const int64_t step = interleaved ? 2 : 1, other = interleaved ? 1 : half;
    for (int64_t c = 0; c < half; c++) {
      const float a = from[c * step], b = from[c * step + other];
      to[c * step] = a * cs[c] - b * sn[c];
      to[c * step + other] = b * cs[c] + a * sn[c];
    }
    for (int64_t c = 2 * half; c < e->width; c++) to[c] = from[c];
  }
}

enum { ADD, SUBTRACT, MULTIPLY, COPY, FIRST_ACTIVATION };

INLINE Floats combined(Floats a, Floats b, const int kind) {
  if (kind == ADD) return add(a, b);
  if (kind == SUBTRACT) return subtract(a, b);
  return kind == MULTIPLY ? multiply(a, b) : a;
}

/* out = a + b, a - b, a * b, a, or activation(a) * b; no b: only the activation. */
INLINE void pointwise(const Extent *e, const float *a, const float *b, float *out,
                      const int kind) {
  const int64_t chunks = (e->width + CHUNK - 1) / CHUNK, rows = e->tokens * e->heads;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < rows * chunks; i++) {
    const int64_t t = i / chunks / e->heads, h = i / chunks % e->heads, first = i % chunks * CHUNK;
    const int64_t end = first + CHUNK < e->width ? first + CHUNK : e->width;
    for (int64_t c = first; c < end; c += LANES) {
      Floats v = load_some(AT(a, 0) + c, end - c);
      if (kind >= FIRST_ACTIVATION) {
        v = activated(v, kind - FIRST_ACTIVATION);
        if (b) v = multiply(v, load_some(AT(b, 1) + c, end - c));
      } else if (kind != COPY) {
        v = combined(v, load_some(AT(b, 1) + c, end - c), kind);
      }
      store_some(AT(out, 3) + c, v, end - c);
    }
  }
}

#define POINTWISE(kind)                                                                   \
  case kind:                                                                              \
    pointwise(e, a, b, out, kind);                                                        \
    break;
static void pointwise_team(const Extent *e, const float *a, const float *b, float *out,
                           int64_t kind) {
  switch (kind) {
    POINTWISE(ADD) POINTWISE(SUBTRACT) POINTWISE(MULTIPLY) POINTWISE(COPY)
    POINTWISE(FIRST_ACTIVATION + SILU) POINTWISE(FIRST_ACTIVATION + GELU)
    POINTWISE(FIRST_ACTIVATION + GELU_TANH) POINTWISE(FIRST_ACTIVATION + QUICK_GELU)
    POINTWISE(FIRST_ACTIVATION + RELU) POINTWISE(FIRST_ACTIVATION + SIGMOID)
  }
}

/* y [tokens, rows] = x @ weight.T + bias with a dense weight [rows, length]: for few tokens. */
static void dense_team(const float *x, int64_t stride, const float *weight, const float *bias,
                       float *y, int64_t y_stride, int64_t tokens, int64_t rows, int64_t length) {
#pragma omp for schedule(static)
  for (int64_t row = 0; row < rows; row++) {
    const float *w = weight + row * length;
    for (int64_t t = 0; t < tokens; t++) {
      Floats sum[4] = {zeros(), zeros(), zeros(), zeros()};
      const float *from = x + t * stride;
      int64_t k = 0;
      for (; k + 4 * LANES <= length; k += 4 * LANES)
        UNROLL for (int c = 0; c < 4; c++)
          sum[c] = multiply_add(load(w + k + c * LANES), load(from + k + c * LANES), sum[c]);
      for (; k < length; k += LANES)
        sum[0] = multiply_add(load_some(w + k, length - k), load_some(from + k, length - k), sum[0]);
      const float total = sum_of(add(add(sum[0], sum[1]), add(sum[2], sum[3])));
      y[t * y_stride + row] = total + (bias ? bias[row] : 0);
    }
  }
}

#endif
