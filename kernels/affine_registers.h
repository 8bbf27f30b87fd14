/* A tile's registers, its codes and what every kernel is told. */

#ifndef AFFINE_REGISTERS_H
#define AFFINE_REGISTERS_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#define PANEL_TILES 2
#define BLOCK_ROWS 12
#define SKINNY_ROWS 8
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#define PANEL_TILES 1
#define BLOCK_ROWS 6
#define SKINNY_ROWS 4
#else
#define VECTOR_BYTES 16
#define PANEL_TILES 1
#define BLOCK_ROWS 6
#define SKINNY_ROWS 4
#endif
#define WIDTH (VECTOR_BYTES / 4)
#define PARTS (LANES / WIDTH)
#define PANEL_COLUMNS (PANEL_TILES * LANES)
#define SERIAL_WORK 100000 /* multiplications below which waking threads costs more than it gives */

typedef float vf __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t vi __attribute__((vector_size(VECTOR_BYTES)));

typedef struct {
  vf v[PARTS];
} Floats; /* 16 floats */
typedef struct {
  vi v[PARTS];
} Words; /* 16 words of packed codes */

typedef struct {
  const float *x;       /* [tokens, K] */
  const uint8_t *codes; /* [tiles, tile_bytes] */
  const float *scale;   /* [tiles, groups, 16] */
  const float *zero;    /* [tiles, groups, 16] or NULL */
  const float *bias;    /* [N] or NULL */
  float *y;             /* [tokens, N] */
  int64_t tokens, rows, length, group, tile_bytes, bits;
  int64_t rounded; /* activations of many tokens may be rounded to 8 bits */
} Linear;

/* ---- registers ---- */

INLINE Floats load(const float *from) {
  Floats out;
  UNROLL for (int i = 0; i < PARTS; i++) memcpy(&out.v[i], from + i * WIDTH, VECTOR_BYTES);
  return out;
}

INLINE void store(float *to, Floats value) {
  UNROLL for (int i = 0; i < PARTS; i++) memcpy(to + i * WIDTH, &value.v[i], VECTOR_BYTES);
}

INLINE Floats zeros(void) {
  Floats out;
  UNROLL for (int i = 0; i < PARTS; i++) out.v[i] = (vf){0};
  return out;
}

INLINE Floats add(Floats a, Floats b) {
  UNROLL for (int i = 0; i < PARTS; i++) a.v[i] += b.v[i];
  return a;
}

INLINE Floats subtract(Floats a, Floats b) {
  UNROLL for (int i = 0; i < PARTS; i++) a.v[i] -= b.v[i];
  return a;
}

INLINE Floats multiply(Floats a, Floats b) {
  UNROLL for (int i = 0; i < PARTS; i++) a.v[i] *= b.v[i];
  return a;
}

INLINE Floats multiply_add(Floats a, Floats b, Floats sum) {
  UNROLL for (int i = 0; i < PARTS; i++) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}

INLINE Floats scaled_add(Floats a, float factor, Floats sum) {
  UNROLL for (int i = 0; i < PARTS; i++) sum.v[i] += a.v[i] * factor;
  return sum;
}

/* ---- codes ---- */

INLINE int codes_in_word(int bits) { return 32 / bits; }

INLINE int64_t group_bytes(int bits, int64_t length) {
  const int per = codes_in_word(bits);
  return (length + per - 1) / per * LANES * 4;
}

INLINE Words words_at(const uint8_t *from) {
  Words out;
  UNROLL for (int i = 0; i < PARTS; i++) memcpy(&out.v[i], from + i * VECTOR_BYTES, VECTOR_BYTES);
  return out;
}

/* Column `place` of every word, minus the centre. AVX512 looks the value up by the low four bits,
   so codes need no masking: for two bits the table repeats. */
INLINE Floats code_of(Words words, const int bits, const int place) {
  const int shift = place % 4 * 8 + place / 4 * bits;
  Floats out;
#ifdef __AVX512F__
  const __m512 four = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
  const __m512 two = _mm512_setr_ps(-2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1, -2, -1, 0, 1);
  if (bits < 8) {
    const __m512i index = _mm512_srli_epi32((__m512i)words.v[0], shift);
    out.v[0] = (vf)_mm512_permutexvar_ps(index, bits == 4 ? four : two);
    return out;
  }
#endif
  UNROLL for (int i = 0; i < PARTS; i++) {
    const vi code = (words.v[i] >> shift) & ((1 << bits) - 1);
    out.v[i] = __builtin_convertvector(code - (1 << (bits - 1)), vf);
  }
  return out;
}

#endif
