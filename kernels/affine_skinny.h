/* Few tokens in float32: codes are streamed once, every token's sums stay in registers. */

#ifndef AFFINE_SKINNY_H
#define AFFINE_SKINNY_H

#include "affine_registers.h"

/* part[token][chain] += x[token][k] * (code - centre - zero) over one group. Several chains hide
   the latency of the sums. */
#define CHAINS(tokens) ((tokens) == 1 ? 4 : (tokens) < 4 ? 2 : 1)

INLINE void one_column(Floats part[][4], const int tokens, Floats value, const float *x,
                       int64_t stride, int chain, const Floats *zero) {
  if (zero) value = subtract(value, *zero);
  UNROLL for (int m = 0; m < tokens; m++)
    part[m][chain] = scaled_add(value, x[m * stride], part[m][chain]);
}

INLINE void one_group(Floats part[][4], const int tokens, const int bits, const uint8_t *codes,
                      const float *x, int64_t stride, int64_t length, const Floats *zero) {
  const int chains = CHAINS(tokens), per = codes_in_word(bits);
  int64_t k = 0;
  for (; k + per <= length; k += per, codes += LANES * 4) {
    const Words words = words_at(codes);
    UNROLL for (int i = 0; i < per; i++)
      one_column(part, tokens, code_of(words, bits, i), x + k + i, stride, i % chains, zero);
  }
  if (k == length) return;
  const Words words = words_at(codes);
  UNROLL for (int i = 0; i < per - 1; i++) {
    if (k + i >= length) break;
    one_column(part, tokens, code_of(words, bits, i), x + k + i, stride, i % chains, zero);
  }
}

INLINE void write_rows(const Linear *a, int64_t row, int64_t token, Floats sum) {
  float *to = a->y + token * a->rows + row;
  if (row + LANES <= a->rows) {
    store(to, sum);
  } else {
    float whole[LANES];
    store(whole, sum);
    memcpy(to, whole, (a->rows - row) * sizeof(float));
  }
}

INLINE Floats bias_of(const Linear *a, int64_t row) {
  if (!a->bias) return zeros();
  if (row + LANES <= a->rows) return load(a->bias + row);
  float whole[LANES] = {0};
  if (row < a->rows) memcpy(whole, a->bias + row, (a->rows - row) * sizeof(float));
  return load(whole);
}

INLINE void skinny_tile(const Linear *a, const int tokens, const int bits, int64_t first,
                        int64_t tile) {
  const int64_t groups = (a->length + a->group - 1) / a->group;
  const uint8_t *codes = a->codes + tile * a->tile_bytes;
  const float *x = a->x + first * a->length;
  Floats sum[SKINNY_ROWS];
  UNROLL for (int m = 0; m < tokens; m++) sum[m] = bias_of(a, tile * LANES);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t start = g * a->group;
    const int64_t length = a->group < a->length - start ? a->group : a->length - start;
    const int64_t at = (tile * groups + g) * LANES;
    Floats zero, part[SKINNY_ROWS][4];
    UNROLL for (int m = 0; m < tokens; m++)
      UNROLL for (int c = 0; c < 4; c++) part[m][c] = zeros();
    if (a->zero) {
      zero = load(a->zero + at);
      one_group(part, tokens, bits, codes, x + start, a->length, length, &zero);
    } else {
      one_group(part, tokens, bits, codes, x + start, a->length, length, 0);
    }
    codes += group_bytes(bits, length);
    const Floats scale = load(a->scale + at);
    UNROLL for (int m = 0; m < tokens; m++) {
      if (CHAINS(tokens) == 4)
        part[m][0] = add(add(part[m][0], part[m][1]), add(part[m][2], part[m][3]));
      if (CHAINS(tokens) == 2) part[m][0] = add(part[m][0], part[m][1]);
      sum[m] = multiply_add(part[m][0], scale, sum[m]);
    }
  }
  UNROLL for (int m = 0; m < tokens; m++) write_rows(a, tile * LANES, first + m, sum[m]);
}

#define SKINNY(m, bits)                                                                 \
  static void skinny_##m##_##bits(const Linear *a, int64_t first, int64_t tile) {       \
    skinny_tile(a, m, bits, first, tile);                                               \
  }
#define SKINNY_WIDTHS(m) SKINNY(m, 2) SKINNY(m, 4) SKINNY(m, 8)
SKINNY_WIDTHS(1) SKINNY_WIDTHS(2) SKINNY_WIDTHS(3) SKINNY_WIDTHS(4)
#if SKINNY_ROWS == 8
SKINNY_WIDTHS(5) SKINNY_WIDTHS(6) SKINNY_WIDTHS(7) SKINNY_WIDTHS(8)
#endif
#define SKINNY_ROW(m) {skinny_##m##_2, skinny_##m##_4, skinny_##m##_8}

typedef void (*Skinny)(const Linear *, int64_t, int64_t);
static const Skinny skinny_for[SKINNY_ROWS][3] = {
    SKINNY_ROW(1), SKINNY_ROW(2), SKINNY_ROW(3), SKINNY_ROW(4),
#if SKINNY_ROWS == 8
    SKINNY_ROW(5), SKINNY_ROW(6), SKINNY_ROW(7), SKINNY_ROW(8),
#endif
};

/* Done together by the threads of a team (a parallel region), who meet at its end. */
static void skinny_team(const Linear *a) {
  const int64_t tiles = (a->rows + LANES - 1) / LANES;
  const int width = a->bits == 2 ? 0 : a->bits == 4 ? 1 : 2;
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t first = 0; first < a->tokens; first += SKINNY_ROWS) {
      const int64_t left = a->tokens - first;
      skinny_for[(left < SKINNY_ROWS ? left : SKINNY_ROWS) - 1][width](a, first, tile);
    }
}

#endif
