/* Few tokens by byte products, where the processor has them (AVX512 VNNI). */

#ifndef AFFINE_BYTES_H
#define AFFINE_BYTES_H

#include "affine_skinny.h"

/* Byte products: x is written as `factor` times a whole number of 24 bits, by blocks of at most
   BYTE_BLOCK columns, and that number as three signed bytes. Their products with the codes are
   sums of bytes times bytes, which are exact, so what is lost is half of 2^-23 of the block's
   largest |x|: as much as float32 sums lose. (Error-free slicing after Ozaki et al. 2012.) */
#ifdef __AVX512VNNI__
#define HAS_BYTE_PRODUCTS 1
#define BYTE_BLOCK 64
#define BYTE_ROWS 4 /* tokens; with more, float sums are as fast */
#define LARGEST 8355000.0f /* a little below 127 * 2^16 + 127 * 2^8 + 127, for rounding */

INLINE __mmask16 first_lanes(int64_t count) {
  return count <= 0 ? 0 : count < LANES ? (__mmask16)((1 << count) - 1) : (__mmask16)0xffff;
}

typedef struct {
  float *factor;   /* [tokens, blocks] */
  int32_t *begin;  /* [tokens, blocks, 3]: what each sum begins with: -centre * sum of the bytes */
  int32_t *totals; /* [tokens, blocks, 3]: minus the sums of each byte, as 16 bits */
  int8_t *bytes;   /* [tokens, 3, columns] */
  int64_t blocks, columns;
  void *memory;
} Sliced;

/* One block of x; false where it holds numbers that this form cannot (infinite, NaN, tiny). */
static int slice_block(const float *x, int64_t length, int64_t padded, int8_t *bytes,
                       int64_t stride, int32_t *total, float *factor) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i bound = _mm512_setzero_si512(); /* as integers, magnitudes order like floats, NaN last */
  for (int64_t k = 0; k < length; k += LANES) {
    const __m512i part = _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(length - k), x + k));
    bound = _mm512_max_epi32(bound, _mm512_and_si512(part, magnitude));
  }
  const int32_t highest = _mm512_reduce_max_epi32(bound);
  float largest;
  memcpy(&largest, &highest, 4);
  if (!(largest < 3e38f) || (largest > 0 && largest < 1e-30f)) return 0;
  const __m512 up = _mm512_set1_ps(largest > 0 ? LARGEST / largest : 0);
  __m512i sum[3] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  for (int64_t k = 0; k < padded; k += LANES) {
    const __m512 part = _mm512_maskz_loadu_ps(first_lanes(length - k), x + k);
    const __mmask16 there = first_lanes(padded - k);
    __m512i number = _mm512_cvtps_epi32(_mm512_mul_ps(part, up));
    for (int l = 0; l < 3; l++) {
      const __m512i low = _mm512_srai_epi32(_mm512_slli_epi32(number, 24), 24);
      _mm512_mask_cvtepi32_storeu_epi8(bytes + l * stride + k, there, low);
      sum[l] = _mm512_add_epi32(sum[l], low);
      number = _mm512_srai_epi32(_mm512_sub_epi32(number, low), 8);
    }
  }
  for (int l = 0; l < 3; l++) total[l] = _mm512_reduce_add_epi32(sum[l]);
  *factor = largest / LARGEST;
  return 1;
}

/* Slices all tokens; false where that is impossible, and then nothing is left allocated. */
static int slice(const Linear *a, Sliced *s) {
  const int64_t per = codes_in_word(a->bits), groups = (a->length + a->group - 1) / a->group;
  const int64_t in_group = (a->group + BYTE_BLOCK - 1) / BYTE_BLOCK;
  s->blocks = groups * in_group;
  s->columns = groups * ((a->group + per - 1) / per * per);
  const int64_t bytes = a->tokens * (s->blocks * 28 + 3 * s->columns);
  s->memory = malloc(bytes);
  if (!s->memory) return 0;
  s->factor = s->memory;
  s->begin = (int32_t *)(s->factor + a->tokens * s->blocks);
  s->totals = s->begin + a->tokens * s->blocks * 3;
  s->bytes = (int8_t *)(s->totals + a->tokens * s->blocks * 3);
  for (int64_t m = 0; m < a->tokens; m++) {
    int64_t block = m * s->blocks, at = m * 3 * s->columns;
    for (int64_t start = 0; start < a->length; start += a->group) {
      const int64_t end = start + a->group < a->length ? start + a->group : a->length;
      for (int64_t k = start; k < end; k += BYTE_BLOCK, block++) {
        const int64_t length = end - k < BYTE_BLOCK ? end - k : BYTE_BLOCK;
        const int64_t padded = (length + per - 1) / per * per;
        if (!slice_block(a->x + m * a->length + k, length, padded, s->bytes + at, s->columns,
                         s->totals + 3 * block, s->factor + block)) {
          free(s->memory);
          return 0;
        }
        for (int64_t l = 3 * block; l < 3 * block + 3; l++) {
          s->begin[l] = -s->totals[l] * (1 << (a->bits - 1));
          s->totals[l] = -s->totals[l] & 0xffff;
        }
        at += padded;
      }
    }
  }
  return 1;
}

/* sum[token] += scale * one block of sliced columns; `chain` of two hides latency. */
INLINE void byte_block(Floats *sum, const int tokens, const int bits, const uint8_t *codes,
                       int64_t words, const Sliced *s, int64_t block, int64_t column,
                       __m512 scale, const __m512i *zero) {
  const int chains = tokens == 1 ? 2 : 1, quads = 8 / bits;
  const __m512i mask = _mm512_set1_epi8((char)((1 << bits) - 1));
  __m512i part[BYTE_ROWS][3][2];
  UNROLL for (int m = 0; m < tokens; m++) {
    const int64_t at = 3 * (m * s->blocks + block);
    UNROLL for (int l = 0; l < 3; l++) {
      __m512i begin = _mm512_set1_epi32(s->begin[at + l]);
      if (zero) begin = _mm512_dpwssd_epi32(begin, *zero, _mm512_set1_epi32(s->totals[at + l]));
      part[m][l][0] = begin;
      part[m][l][1] = _mm512_setzero_si512();
    }
  }
  const int8_t *bytes = s->bytes + column;
  for (int64_t w = 0; w < words; w++, codes += LANES * 4) {
    const __m512i packed = _mm512_loadu_si512(codes);
    UNROLL for (int j = 0; j < quads; j++, bytes += 4) {
      __m512i code = j ? _mm512_srli_epi32(packed, bits * j) : packed;
      if (bits < 8) code = _mm512_and_si512(code, mask);
      UNROLL for (int m = 0; m < tokens; m++)
        UNROLL for (int l = 0; l < 3; l++) {
          int32_t quad;
          memcpy(&quad, bytes + (m * 3 + l) * s->columns, 4);
          const int c = chains == 2 && quads > 1 ? j & 1 : 0;
          part[m][l][c] = _mm512_dpbusd_epi32(part[m][l][c], code, _mm512_set1_epi32(quad));
        }
    }
  }
  UNROLL for (int m = 0; m < tokens; m++) {
    UNROLL for (int l = 0; l < 3; l++)
      if (chains == 2 && quads > 1) part[m][l][0] = _mm512_add_epi32(part[m][l][0], part[m][l][1]);
    const __m512i low = _mm512_add_epi32(_mm512_slli_epi32(part[m][1][0], 8), part[m][0][0]);
    const __m512 high = _mm512_cvtepi32_ps(part[m][2][0]);
    const __m512 whole = _mm512_fmadd_ps(high, _mm512_set1_ps(65536), _mm512_cvtepi32_ps(low));
    const __m512 step = _mm512_mul_ps(scale, _mm512_set1_ps(s->factor[m * s->blocks + block]));
    sum[m].v[0] = (vf)_mm512_fmadd_ps(whole, step, (__m512)sum[m].v[0]);
  }
}

INLINE void bytes_tile(const Linear *a, const Sliced *s, const int tokens, const int bits,
                       int64_t tile) {
  const int64_t groups = (a->length + a->group - 1) / a->group, per = codes_in_word(bits);
  const uint8_t *codes = a->codes + tile * a->tile_bytes;
  Floats sum[SKINNY_ROWS];
  UNROLL for (int m = 0; m < tokens; m++) sum[m] = bias_of(a, tile * LANES);
  int64_t block = 0, column = 0;
  for (int64_t g = 0; g < groups; g++) {
    const int64_t start = g * a->group;
    const int64_t length = a->group < a->length - start ? a->group : a->length - start;
    const int64_t at = (tile * groups + g) * LANES;
    const __m512 scale = _mm512_loadu_ps(a->scale + at);
    __m512i zero = _mm512_setzero_si512();
    if (a->zero) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_loadu_ps(a->zero + at));
      zero = _mm512_and_si512(whole, _mm512_set1_epi32(0xffff));
    }
    for (int64_t k = 0; k < length; k += BYTE_BLOCK, block++) {
      const int64_t left = length - k < BYTE_BLOCK ? length - k : BYTE_BLOCK;
      const int64_t words = (left + per - 1) / per;
      if (a->zero)
        byte_block(sum, tokens, bits, codes, words, s, block, column, scale, &zero);
      else
        byte_block(sum, tokens, bits, codes, words, s, block, column, scale, 0);
      codes += words * LANES * 4, column += words * per;
    }
  }
  UNROLL for (int m = 0; m < tokens; m++) write_rows(a, tile * LANES, m, sum[m]);
}

#define BYTES(m, bits)                                                                  \
  static void bytes_##m##_##bits(const Linear *a, const Sliced *s, int64_t tile) {      \
    bytes_tile(a, s, m, bits, tile);                                                    \
  }
#define BYTES_WIDTHS(m) BYTES(m, 2) BYTES(m, 4) BYTES(m, 8)
BYTES_WIDTHS(1) BYTES_WIDTHS(2) BYTES_WIDTHS(3) BYTES_WIDTHS(4)
#define BYTES_ROW(m) {bytes_##m##_2, bytes_##m##_4, bytes_##m##_8}
typedef void (*Bytes)(const Linear *, const Sliced *, int64_t);
static const Bytes bytes_for[BYTE_ROWS][3] = {
  BYTES_ROW(1), BYTES_ROW(2), BYTES_ROW(3), BYTES_ROW(4)};

/* Done together by a team. Every thread slices x for itself, which costs less than to wait; all
   come to the same answer whether that is possible. */
static int bytes_team(const Linear *a) {
  Sliced s;
  if (!slice(a, &s)) return 0;
  const int64_t tiles = (a->rows + LANES - 1) / LANES;
  const Bytes run = bytes_for[a->tokens - 1][a->bits == 2 ? 0 : a->bits == 4 ? 1 : 2];
#pragma omp for schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++) run(a, &s, tile);
  free(s.memory);
  return 1;
}
#endif

#endif
