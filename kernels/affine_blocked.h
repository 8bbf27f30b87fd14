/* Many tokens: a blocked float32 product on panels of decoded rows. */

#ifndef AFFINE_BLOCKED_H
#define AFFINE_BLOCKED_H

#include "affine_registers.h"

#define PANEL_DEPTH 512 /* columns of the weight decoded at once: a panel stays in cache */
#define TOKEN_BLOCK 192 /* tokens packed at once: bounds memory, hides the decoding */

/* Columns [from, to) of one tile, decoded to `out` [to - from, PANEL_COLUMNS]. `from` is the start
   of a group or lies a multiple of PANEL_DEPTH after it. */
INLINE void decode_tile(const Linear *a, const int bits, int64_t tile, int64_t from, int64_t to,
                        float *out) {
  const int64_t groups = (a->length + a->group - 1) / a->group;
  const int per = codes_in_word(bits);
  const uint8_t *codes = a->codes + tile * a->tile_bytes;
  int64_t g = from / a->group;
  codes += g * group_bytes(bits, a->group);
  for (int64_t k = from; k < to; g++) {
    const int64_t start = g * a->group;
    int64_t end = start + a->group < to ? start + a->group : to;
    const int64_t at = (tile * groups + g) * LANES;
    const Floats scale = load(a->scale + at), zero = a->zero ? load(a->zero + at) : zeros();
    const uint8_t *word = codes + group_bytes(bits, k - start);
    for (; k < end; word += LANES * 4) {
      const Words words = words_at(word);
      UNROLL for (int i = 0; i < per; i++) {
        if (k == end) break;
        store(out, multiply(subtract(code_of(words, bits, i), zero), scale));
        out += PANEL_COLUMNS, k++;
      }
    }
    codes += group_bytes(bits, a->group);
  }
}

static void decode_panel(const Linear *a, int64_t panel, int64_t from, int64_t to, float *out) {
  const int64_t tiles = (a->rows + LANES - 1) / LANES;
  for (int i = 0; i < PANEL_TILES; i++) {
    const int64_t tile = panel * PANEL_TILES + i;
    if (tile >= tiles) {
      for (int64_t k = 0; k < to - from; k++) store(out + k * PANEL_COLUMNS + i * LANES, zeros());
    } else if (a->bits == 2) {
      decode_tile(a, 2, tile, from, to, out + i * LANES);
    } else if (a->bits == 4) {
      decode_tile(a, 4, tile, from, to, out + i * LANES);
    } else {
      decode_tile(a, 8, tile, from, to, out + i * LANES);
    }
  }
}

/* sums [m, PANEL_COLUMNS] += tokens [depth, m] (transposed) times panel [depth, PANEL_COLUMNS]. */
INLINE void multiply_block(const int m, const float *tokens, const float *panel, int64_t depth,
                           float *sums, int64_t stride) {
  Floats sum[BLOCK_ROWS][PANEL_TILES];
  UNROLL for (int i = 0; i < m; i++)
    UNROLL for (int j = 0; j < PANEL_TILES; j++) sum[i][j] = load(sums + i * stride + j * LANES);
  for (int64_t k = 0; k < depth; k++) {
    Floats column[PANEL_TILES];
    UNROLL for (int j = 0; j < PANEL_TILES; j++) column[j] = load(panel + j * LANES);
    UNROLL for (int i = 0; i < m; i++)
      UNROLL for (int j = 0; j < PANEL_TILES; j++)
        sum[i][j] = scaled_add(column[j], tokens[i], sum[i][j]);
    tokens += m, panel += PANEL_COLUMNS;
  }
  UNROLL for (int i = 0; i < m; i++)
    UNROLL for (int j = 0; j < PANEL_TILES; j++) store(sums + i * stride + j * LANES, sum[i][j]);
}

typedef void (*Block)(const float *, const float *, int64_t, float *, int64_t);
#define BLOCK(m)                                                                                 \
  static void block_##m(const float *t, const float *p, int64_t depth, float *s, int64_t n) {    \
    multiply_block(m, t, p, depth, s, n);                                                        \
  }
BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
#if BLOCK_ROWS == 12
BLOCK(7) BLOCK(8) BLOCK(9) BLOCK(10) BLOCK(11) BLOCK(12)
#endif
static const Block block_for[BLOCK_ROWS] = {
    block_1, block_2, block_3, block_4, block_5, block_6,
#if BLOCK_ROWS == 12
    block_7, block_8, block_9, block_10, block_11, block_12,
#endif
};

/* `count` tokens in `blocks` blocks whose sizes differ by at most one: where block b begins. */
INLINE int64_t block_start(int64_t count, int64_t blocks, int64_t b) { return count * b / blocks; }

static int64_t panel_end(const Linear *a, int64_t from) {
  int64_t end;
  if (a->group < PANEL_DEPTH) {
    end = from + PANEL_DEPTH / a->group * a->group;
  } else {
    const int64_t group_end = (from / a->group + 1) * a->group;
    end = from + PANEL_DEPTH < group_end ? from + PANEL_DEPTH : group_end;
  }
  return end < a->length ? end : a->length;
}

static void begin_sums(const Linear *a, int64_t row, float *to, int64_t columns) {
  if (a->bias)
    memcpy(to, a->bias + row, columns * sizeof(float));
  else
    memset(to, 0, columns * sizeof(float));
}

/* Tokens [first, first + count) of the columns of one panel; `packed` holds the tokens by blocks,
   each [length, m]. `panel` and `edge` are scratch of the calling thread. */
static void blocked_panel(const Linear *a, int64_t index, int64_t first, int64_t count,
                          int64_t blocks, const float *packed, float *panel, float *edge) {
  const int64_t row = index * PANEL_COLUMNS, left = a->rows - row;
  const int64_t columns = left < PANEL_COLUMNS ? left : PANEL_COLUMNS;
  for (int64_t token = first; token < first + count; token++)
    begin_sums(a, row, a->y + token * a->rows + row, columns);
  for (int64_t from = 0, to; from < a->length; from = to) {
    to = panel_end(a, from);
    decode_panel(a, index, from, to, panel);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t begin = block_start(count, blocks, b);
      const int64_t m = block_start(count, blocks, b + 1) - begin;
      const float *tokens = packed + begin * a->length + from * m;
      float *sums = a->y + (first + begin) * a->rows + row;
      if (columns == PANEL_COLUMNS) {
        block_for[m - 1](tokens, panel, to - from, sums, a->rows);
        continue;
      }
      for (int64_t i = 0; i < m; i++)
        memcpy(edge + i * PANEL_COLUMNS, sums + i * a->rows, columns * sizeof(float));
      block_for[m - 1](tokens, panel, to - from, edge, PANEL_COLUMNS);
      for (int64_t i = 0; i < m; i++)
        memcpy(sums + i * a->rows, edge + i * PANEL_COLUMNS, columns * sizeof(float));
    }
  }
}

static void pack_block(const Linear *a, int64_t first, int64_t m, float *to) {
  const float *x = a->x + first * a->length;
  for (int64_t k = 0; k < a->length; k++)
    for (int64_t i = 0; i < m; i++) to[k * m + i] = x[i * a->length + k];
}

INLINE int64_t packed_floats(int64_t tokens, int64_t length) {
  return (tokens < TOKEN_BLOCK ? tokens : TOKEN_BLOCK) * length;
}

/* Done together by a team; `packed` is theirs in common, packed_floats() long. */
static void blocked_team(const Linear *a, float *packed) {
  const int64_t panels = (a->rows + PANEL_COLUMNS - 1) / PANEL_COLUMNS;
  _Alignas(64) float panel[PANEL_DEPTH * PANEL_COLUMNS];
  _Alignas(64) float edge[BLOCK_ROWS * PANEL_COLUMNS] = {0};
  for (int64_t first = 0; first < a->tokens; first += TOKEN_BLOCK) {
    const int64_t left = a->tokens - first, count = left < TOKEN_BLOCK ? left : TOKEN_BLOCK;
    const int64_t blocks = (count + BLOCK_ROWS - 1) / BLOCK_ROWS;
#pragma omp for schedule(static)
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t begin = block_start(count, blocks, b);
      const int64_t m = block_start(count, blocks, b + 1) - begin;
      pack_block(a, first + begin, m, packed + begin * a->length);
    }
#pragma omp for schedule(static)
    for (int64_t index = 0; index < panels; index++)
      blocked_panel(a, index, first, count, blocks, packed, panel, edge);
  }
}

#endif
