/* Many tokens by byte products on activations rounded to 8 bits, where that was asked for. */

#ifndef AFFINE_ROUNDED_H
#define AFFINE_ROUNDED_H

#include <math.h>

#include "affine_bytes.h"

#ifdef HAS_BYTE_PRODUCTS
#define ROUNDED_ROWS 12 /* tokens at once: 12 registers of integer sums and 12 of float sums */

/* Tokens in parts of at most ROUNDED_ROWS; part p holds tokens [12 p, 12 p + m). Of each block of
   at most BYTE_BLOCK columns, every token has a factor (its largest |x| / 127) and signed bytes. */
typedef struct {
  float *factor;   /* [parts, blocks, 12] */
  int32_t *begin;  /* [parts, blocks, 12]: -centre * sum of the bytes */
  int32_t *totals; /* [parts, blocks, 12]: minus that sum, as 16 bits */
  int8_t *bytes;   /* [parts, columns / 4, 12, 4] */
  int64_t blocks, columns, parts;
} Rounded;

INLINE Rounded rounded_sizes(const Linear *a, float *memory) {
  const int64_t per = codes_in_word(a->bits), groups = (a->length + a->group - 1) / a->group;
  const int64_t group = a->group < a->length ? a->group : a->length;
  Rounded r;
  r.blocks = groups * ((group + BYTE_BLOCK - 1) / BYTE_BLOCK);
  r.columns = groups * ((group + per - 1) / per * per);
  r.parts = (a->tokens + ROUNDED_ROWS - 1) / ROUNDED_ROWS;
  const int64_t each = r.parts * r.blocks * ROUNDED_ROWS;
  r.factor = memory;
  r.begin = (int32_t *)(memory + each);
  r.totals = r.begin + each;
  r.bytes = (int8_t *)(r.totals + each);
  return r;
}

INLINE int64_t rounded_floats(const Linear *a) {
  const Rounded r = rounded_sizes(a, 0);
  return 3 * r.parts * r.blocks * ROUNDED_ROWS + r.parts * ROUNDED_ROWS * r.columns / 4 + 16;
}

/* `length` columns of one token, rounded to the nearest of 255 steps; returns their sum. */
INLINE int32_t round_block(const float *x, int64_t length, int64_t padded, int8_t *to,
                           float *factor) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i bound = _mm512_setzero_si512();
  for (int64_t k = 0; k < length; k += LANES) {
    const __m512i part = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(length - k), x + k));
    bound = _mm512_max_epi32(bound, _mm512_and_si512(part, magnitude));
  }
  const int32_t highest = _mm512_reduce_max_epi32(bound);
  float largest;
  memcpy(&largest, &highest, 4);
  const int plain = largest >= 1e-30f && largest < 3e38f;
  const __m512 up = _mm512_set1_ps(plain ? 127 / largest : 0);
  __m512i sum = _mm512_setzero_si512();
  int8_t bytes[BYTE_BLOCK + LANES];
  for (int64_t k = 0; k < padded; k += LANES) {
    const __m512 part = _mm512_maskz_loadu_ps(plain ? first_lanes(length - k) : 0, x + k);
    const __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(part, up));
    sum = _mm512_add_epi32(sum, number);
    _mm_storeu_si128((__m128i *)(bytes + k), _mm512_cvtepi32_epi8(number));
  }
  for (int64_t k = 0; k < padded; k += 4) memcpy(to + k * ROUNDED_ROWS, bytes + k, 4);
  *factor = plain ? largest / 127 : largest < 1e-30f ? 0 : largest * NAN;
  return _mm512_reduce_add_epi32(sum);
}

static void round_token(const Linear *a, const Rounded *r, int64_t token) {
  const int64_t part = token / ROUNDED_ROWS, row = token % ROUNDED_ROWS;
  const int64_t per = codes_in_word(a->bits), centre = 1 << (a->bits - 1);
  int64_t at = part * r->blocks * ROUNDED_ROWS + row;
  int8_t *to = r->bytes + part * r->columns * ROUNDED_ROWS + row * 4;
  for (int64_t start = 0; start < a->length; start += a->group) {
    const int64_t end = start + a->group < a->length ? start + a->group : a->length;
    for (int64_t k = start; k < end; k += BYTE_BLOCK, at += ROUNDED_ROWS) {
      const int64_t length = end - k < BYTE_BLOCK ? end - k : BYTE_BLOCK;
      const int64_t padded = (length + per - 1) / per * per;
      const float *x = a->x + token * a->length + k;
      const int32_t total = round_block(x, length, padded, to, r->factor + at);
      r->begin[at] = (int32_t)(-total * centre), r->totals[at] = -total & 0xffff;
      to += padded * ROUNDED_ROWS;
    }
  }
}

/* 16 rows of the weight times `m` tokens of one part. */
INLINE void rounded_tile(const Linear *a, const Rounded *r, const int m, const int bits,
                         int64_t tile, int64_t part) {
  const int64_t groups = (a->length + a->group - 1) / a->group, per = codes_in_word(bits);
  const uint8_t *codes = a->codes + tile * a->tile_bytes;
  const int8_t *bytes = r->bytes + part * r->columns * ROUNDED_ROWS;
  const int quads = 8 / bits;
  const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  int64_t at = part * r->blocks * ROUNDED_ROWS;
  Floats sum[ROUNDED_ROWS];
  UNROLL for (int i = 0; i < m; i++) sum[i] = bias_of(a, tile * LANES);
  for (int64_t g = 0; g < groups; g++) {
    const int64_t start = g * a->group, place = (tile * groups + g) * LANES;
    const int64_t length = a->group < a->length - start ? a->group : a->length - start;
    const __m512 scale = _mm512_loadu_ps(a->scale + place);
    for (int64_t k = 0; k < length; k += BYTE_BLOCK, at += ROUNDED_ROWS) {
      const int64_t left = length - k < BYTE_BLOCK ? length - k : BYTE_BLOCK;
      __m512i whole[ROUNDED_ROWS];
      UNROLL for (int i = 0; i < m; i++) whole[i] = _mm512_set1_epi32(r->begin[at + i]);
      if (a->zero) {
        const __m512i zero = _mm512_and_si512(
            _mm512_cvtps_epi32(_mm512_loadu_ps(a->zero + place)), _mm512_set1_epi32(0xffff));
        UNROLL for (int i = 0; i < m; i++)
          whole[i] = _mm512_dpwssd_epi32(whole[i], zero, _mm512_set1_epi32(r->totals[at + i]));
      }
      for (int64_t w = 0; w < (left + per - 1) / per; w++, codes += LANES * 4) {
        const __m512i packed = _mm512_loadu_si512(codes);
        UNROLL for (int j = 0; j < quads; j++, bytes += 4 * ROUNDED_ROWS) {
          __m512i code = j ? _mm512_srli_epi32(packed, bits * j) : packed;
          if (bits < 8) code = _mm512_and_si512(code, mask);
          UNROLL for (int i = 0; i < m; i++) {
            int32_t quad;
            memcpy(&quad, bytes + 4 * i, 4);
            whole[i] = _mm512_dpbusd_epi32(whole[i], code, _mm512_set1_epi32(quad));
          }
        }
      }
      UNROLL for (int i = 0; i < m; i++) {
        const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(r->factor[at + i]));
        sum[i].v[0] = (vf)_mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i]), step, (__m512)sum[i].v[0]);
      }
    }
  }
  UNROLL for (int i = 0; i < m; i++)
    write_rows(a, tile * LANES, part * ROUNDED_ROWS + i, sum[i]);
}

/* The last part's tokens, fewer than twelve, go one by one. */
#define ROUNDED(bits)                                                                         \
  static void rounded_##bits(const Linear *a, const Rounded *r, int64_t tile, int64_t part) { \
    const int64_t left = a->tokens - part * ROUNDED_ROWS;                                     \
    if (left >= 12) rounded_tile(a, r, 12, bits, tile, part);                                 \
    else for (int64_t i = 0; i < left; i++) rounded_one(a, r, bits, tile, part, i);           \
  }

INLINE void rounded_one(const Linear *a, const Rounded *r, const int bits, int64_t tile,
                        int64_t part, int64_t row) {
  Linear shifted = *a;
  shifted.y = a->y + row * a->rows;
  Rounded own = *r;
  own.factor += row, own.begin += row, own.totals += row, own.bytes += 4 * row;
  rounded_tile(&shifted, &own, 1, bits, tile, part);
}
ROUNDED(2) ROUNDED(4) ROUNDED(8)

/* Done together by a team; `memory` is theirs in common, rounded_floats() long. */
static void rounded_team(const Linear *a, float *memory) {
  const Rounded r = rounded_sizes(a, memory);
#pragma omp for schedule(static)
  for (int64_t token = 0; token < a->tokens; token++) round_token(a, &r, token);
  const int64_t tiles = (a->rows + LANES - 1) / LANES;
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t part = 0; part < r.parts; part++) {
      if (a->bits == 2) rounded_2(a, &r, tile, part);
      if (a->bits == 4) rounded_4(a, &r, tile, part);
      if (a->bits == 8) rounded_8(a, &r, tile, part);
    }
}
#endif

#endif
