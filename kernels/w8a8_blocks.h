/* Products of int8 codes by blocks of tokens and tiles of rows. */

#ifndef W8A8_BLOCKS_H
#define W8A8_BLOCKS_H

#include <math.h>

#include "affine_registers.h"

typedef struct {
  const int8_t *x;       /* codes [tokens, stride] */
  const float *x_scale;  /* [tokens] or [1] */
  const int32_t *x_zero; /* likewise, or NULL */
  int64_t each;          /* 1: one a token */
  const uint8_t *codes;  /* [tiles, tile_bytes] */
  const float *scale;    /* [tiles, groups, 16] */
  const float *zero;     /* likewise, less the centre, or NULL */
  const int32_t *sums;   /* likewise: sums of codes less the centre */
  const float *bias;     /* [N] or NULL */
  float *y;              /* [tokens, N] */
  int64_t tokens, rows, length, group, tile_bytes, bits;
  int64_t stride;        /* bytes between tokens */
  int32_t *totals;       /* [tokens, groups]: sums of the codes of x */
} Bytes;

#define TOKENS_AT_ONCE 6
#define TILES_AT_ONCE 4
#define TOKEN_CHUNK 48 /* tokens of one piece of work */

INLINE int64_t w8a8_groups(const Bytes *a) { return (a->length + a->group - 1) / a->group; }

INLINE int64_t padded_to(int64_t length, int64_t per) { return (length + per - 1) / per * per; }

/* Whether every group begins and ends with a whole word of codes, so that x is read in place. */
INLINE int in_place(const Bytes *a) {
  const int64_t per = codes_in_word((int)a->bits);
  return a->length % per == 0 && (a->group >= a->length || a->group % per == 0);
}

INLINE int64_t padded_columns(const Bytes *a) {
  const int64_t per = codes_in_word((int)a->bits), groups = w8a8_groups(a);
  const int64_t group = a->group < a->length ? a->group : a->length;
  return groups * padded_to(group, per);
}

static int64_t w8a8_scratch(const Bytes *a) {
  const int64_t copied = in_place(a) ? 0 : a->tokens * padded_columns(a);
  return a->tokens * w8a8_groups(a) * 4 + copied + 64;
}

#ifdef __AVX512VNNI__
typedef struct {
  __m512i v;
} Sums; /* 16 integer sums */

INLINE Sums whole(int32_t value) { return (Sums){_mm512_set1_epi32(value)}; }
INLINE Sums less_product(Sums a, int32_t factor, const int32_t *b) {
  const __m512i other = _mm512_mullo_epi32(_mm512_set1_epi32(factor), _mm512_loadu_si512(b));
  return (Sums){_mm512_sub_epi32(a.v, other)};
}
INLINE Sums quad(Words words, const int bits, const int place) {
  __m512i code = (__m512i)words.v[0];
  if (place) code = _mm512_srli_epi32(code, bits * place);
  if (bits < 8) code = _mm512_and_si512(code, _mm512_set1_epi8((char)((1 << bits) - 1)));
  return (Sums){code};
}
INLINE Sums add_products(Sums a, Sums code, int32_t bytes) {
  /* Not the intrinsic: around it gcc 12 moves every sum through memory. */
  __m512i x = _mm512_set1_epi32(bytes);
  __asm__("vpdpbusd %2, %1, %0" : "+v"(a.v) : "v"(code.v), "v"(x));
  return a;
}
INLINE Floats as_floats(Sums a) {
  Floats out;
  out.v[0] = (vf)_mm512_cvtepi32_ps(a.v);
  return out;
}
#else
typedef struct {
  int32_t v[LANES];
} Sums;

INLINE Sums whole(int32_t value) {
  Sums out;
  for (int i = 0; i < LANES; i++) out.v[i] = value;
  return out;
}
INLINE Sums less_product(Sums a, int32_t factor, const int32_t *b) {
  for (int i = 0; i < LANES; i++) a.v[i] -= factor * b[i];
  return a;
}
INLINE Sums quad(Words words, const int bits, const int place) {
  Sums out;
  memcpy(&out, &words, sizeof out);
  const uint32_t one = (1u << bits) - 1, mask = one | one << 8 | one << 16 | one << 24;
  for (int i = 0; i < LANES; i++) out.v[i] = (int32_t)((uint32_t)out.v[i] >> (bits * place) & mask);
  return out;
}
INLINE Sums add_products(Sums a, Sums code, int32_t bytes) {
  UNROLL for (int b = 0; b < 4; b++) {
    const int32_t x = (int8_t)(bytes >> (8 * b));
    for (int i = 0; i < LANES; i++) a.v[i] += (code.v[i] >> (8 * b) & 255) * x;
  }
  return a;
}
INLINE Floats as_floats(Sums a) {
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = (float)a.v[i];
  return load(lanes);
}
#endif

INLINE Floats same(float value) {
  Floats out;
  UNROLL for (int i = 0; i < PARTS; i++) out.v[i] = (vf){0} + value;
  return out;
}

/* `m` tokens from `token` times the rows of `n` tiles from `tile`. */
INLINE void w8a8_block(const Bytes *a, const int m, const int n, const int bits, int64_t token,
                       int64_t tile) {
  const int64_t groups = w8a8_groups(a), per = codes_in_word(bits);
  const int32_t centre = 1 << (bits - 1);
  const uint8_t *codes = a->codes + tile * a->tile_bytes;
  const int8_t *x = a->x + token * a->stride;
  Floats total[TOKENS_AT_ONCE][8];
  for (int64_t g = 0; g < groups; g++) {
    const int64_t start = g * a->group;
    const int64_t length = a->group < a->length - start ? a->group : a->length - start;
    Sums sum[TOKENS_AT_ONCE][8];
    UNROLL for (int i = 0; i < m; i++)
      UNROLL for (int j = 0; j < n; j++) {
        sum[i][j] = whole(-centre * a->totals[(token + i) * groups + g]);
        if (a->x_zero)
          sum[i][j] = less_product(sum[i][j], a->x_zero[(token + i) * a->each],
                                   a->sums + ((tile + j) * groups + g) * LANES);
      }
    for (int64_t w = (length + per - 1) / per; w > 0; w--, codes += LANES * 4) {
      Words words[8];
      UNROLL for (int j = 0; j < n; j++) words[j] = words_at(codes + j * a->tile_bytes);
      UNROLL for (int p = 0; p < 8 / bits; p++, x += 4) {
        Sums code[8];
        UNROLL for (int j = 0; j < n; j++) code[j] = quad(words[j], bits, p);
        UNROLL for (int i = 0; i < m; i++) {
          int32_t bytes;
          memcpy(&bytes, x + i * a->stride, 4);
          UNROLL for (int j = 0; j < n; j++) sum[i][j] = add_products(sum[i][j], code[j], bytes);
        }
      }
    }
    UNROLL for (int i = 0; i < m; i++) {
      const int64_t t = token + i;
      const int32_t shift = a->x_zero ? (int32_t)length * a->x_zero[t * a->each] : 0;
      UNROLL for (int j = 0; j < n; j++) {
        const int64_t at = ((tile + j) * groups + g) * LANES;
        Floats found = as_floats(sum[i][j]);
        if (a->zero) {
          const Floats other = same((float)(shift - a->totals[t * groups + g]));
          found = multiply_add(load(a->zero + at), other, found);
        }
        found = multiply(found, load(a->scale + at));
        total[i][j] = g ? add(total[i][j], found) : found;
      }
    }
  }
  UNROLL for (int i = 0; i < m; i++)
    UNROLL for (int j = 0; j < n; j++) {
      const int64_t t = token + i, row = (tile + j) * LANES, left = a->rows - row;
      float lanes[LANES] = {0};
      if (a->bias) memcpy(lanes, a->bias + row, (left < LANES ? left : LANES) * sizeof(float));
      const Floats out = multiply_add(total[i][j], same(a->x_scale[t * a->each]), load(lanes));
      if (left >= LANES) {
        store(a->y + t * a->rows + row, out);
      } else {
        store(lanes, out);
        memcpy(a->y + t * a->rows + row, lanes, left * sizeof(float));
      }
    }
}

typedef void (*Block)(const Bytes *, int64_t, int64_t);
#define W8A8(m, n, bits)                                                             \
  static void w8a8_##m##_##n##_##bits(const Bytes *a, int64_t token, int64_t tile) { \
    w8a8_block(a, m, n, bits, token, tile);                                          \
  }
#define W8A8_TOKENS(n, bits)                                                     \
  W8A8(1, n, bits) W8A8(2, n, bits) W8A8(3, n, bits) W8A8(4, n, bits) W8A8(5, n, bits) \
  W8A8(6, n, bits)                                                                \
  static const Block w8a8_tokens_##n##_##bits[TOKENS_AT_ONCE] = {                 \
      w8a8_1_##n##_##bits, w8a8_2_##n##_##bits, w8a8_3_##n##_##bits,              \
      w8a8_4_##n##_##bits, w8a8_5_##n##_##bits, w8a8_6_##n##_##bits};
W8A8_TOKENS(1, 8) W8A8_TOKENS(4, 8) W8A8_TOKENS(1, 4) W8A8_TOKENS(4, 4)
W8A8_TOKENS(1, 2) W8A8_TOKENS(4, 2)
W8A8(1, 8, 8)

INLINE const Block *w8a8_for(int64_t bits, int single) {
  if (bits == 8) return single ? w8a8_tokens_1_8 : w8a8_tokens_4_8;
  if (bits == 4) return single ? w8a8_tokens_1_4 : w8a8_tokens_4_4;
  return single ? w8a8_tokens_1_2 : w8a8_tokens_4_2;
}

/* The sums of one token's codes by group; and the codes themselves, groups filled to words. */
static void prepare_token(const Bytes *a, const int8_t *x, int64_t token, int8_t *copy) {
  const int64_t groups = w8a8_groups(a), per = codes_in_word((int)a->bits);
  const int8_t *from = x + token * a->length;
  int8_t *to = copy ? copy + token * a->stride : 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t start = g * a->group;
    const int64_t length = a->group < a->length - start ? a->group : a->length - start;
    int32_t total = 0;
    for (int64_t k = 0; k < length; k++) total += from[start + k];
    a->totals[token * groups + g] = total;
    if (to) {
      const int64_t padded = padded_to(length, per);
      memcpy(to, from + start, length);
      memset(to + length, 0, padded - length);
      to += padded;
    }
  }
}

/* Done together by a team; `scratch` is theirs in common, w8a8_scratch() bytes. */
static void w8a8_team(const Bytes *given, char *scratch) {
  Bytes a = *given;
  const int64_t tiles = (a.rows + LANES - 1) / LANES;
  const int64_t wide = a.tokens == 1 && a.bits == 8 ? 8 : TILES_AT_ONCE;
  const int64_t panels = (tiles + wide - 1) / wide;
  const int64_t chunks = (a.tokens + TOKEN_CHUNK - 1) / TOKEN_CHUNK;
  a.totals = (int32_t *)scratch;
  int8_t *copy = 0;
  if (!in_place(&a)) {
    copy = (int8_t *)(a.totals + a.tokens * w8a8_groups(&a));
    a.stride = padded_columns(&a);
    a.x = copy;
  }
#pragma omp for schedule(static)
  for (int64_t token = 0; token < a.tokens; token++) prepare_token(&a, given->x, token, copy);
#pragma omp for schedule(static) collapse(2)
  for (int64_t panel = 0; panel < panels; panel++)
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
      const int64_t first = chunk * TOKEN_CHUNK, tile = panel * wide;
      const int64_t left = a.tokens - first, count = left < TOKEN_CHUNK ? left : TOKEN_CHUNK;
      const int64_t there = tiles - tile < wide ? tiles - tile : wide;
      const int64_t blocks = (count + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE;
      for (int64_t b = 0; b < blocks; b++) {
        const int64_t begin = count * b / blocks, m = count * (b + 1) / blocks - begin;
        int64_t done = 0;
        if (there == 8) {
          w8a8_1_8_8(&a, first + begin, tile);
          done = 8;
        }
        for (; done + 4 <= there; done += 4)
          w8a8_for(a.bits, 0)[m - 1](&a, first + begin, tile + done);
        for (; done < there; done++)
          w8a8_for(a.bits, 1)[m - 1](&a, first + begin, tile + done);
      }
    }
}

/* One row's codes; returns its step: the largest magnitude over 127, NaN where x is not finite.
   As integers, magnitudes order like floats, with infinity and NaN last. */
INLINE float quantize_row(const float *x, int8_t *codes, int64_t length) {
  int32_t highest = 0;
  for (int64_t k = 0; k < length; k++) {
    int32_t size;
    memcpy(&size, x + k, 4);
    size &= 0x7fffffff;
    highest = size > highest ? size : highest;
  }
  float largest;
  memcpy(&largest, &highest, 4);
  if (!(largest < INFINITY)) {
    memset(codes, 0, length);
    return NAN;
  }
  const float scale = largest / 127, step = scale == 0 ? 1 : scale;
  for (int64_t k = 0; k < length; k++) {
    /* Adding and taking 1.5 * 2^23 rounds to nearest, ties to even; |x / step| is below 128. */
    const float steps = (x[k] / step + 12582912.0f) - 12582912.0f;
    const int32_t code = (int32_t)steps;
    codes[k] = (int8_t)(code > 127 ? 127 : code < -127 ? -127 : code);
  }
  return scale;
}

#endif
