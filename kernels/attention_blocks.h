/* Causal attention of the last tokens of a text over its whole cache, by blocks of keys with a
   running softmax (Milakov and Gimelshein 2018; Dao et al. 2022, alg. 1).

   Keys lie in tiles of 16, [kv_heads, capacity / 16, head, 16], so that a register holds the same
   channel of 16 keys and scores need no horizontal sums; values [kv_heads, capacity, width] with
   width = value_head filled up to a multiple of 16. Queries of one group share a pass over the
   keys, as do up to TOGETHER queries: neither is expanded. */

#ifndef ATTENTION_BLOCKS_H
#define ATTENTION_BLOCKS_H

#include "vector_math.h"

#if VECTOR_BYTES == 64
#define TOGETHER 6 /* rows: 2 * 6 registers of scores, 4 * 6 of results */
#else
#define TOGETHER 2
#endif
#define KEYS 32   /* keys a block */
#define FEWEST 64 /* keys that a thread of its own is worth */

typedef struct {
  const float *q;      /* query t, head h at t * q_token + h * q_head */
  const float *keys, *values;
  const float *sinks;  /* [heads] or NULL */
  const float *mask;   /* NULL, or added to scores: head h, query t, key mask_from + j at
                          h * mask_head + t * mask_token + j */
  float *out;          /* query t, head h at t * out_token + h * out_head */
  int64_t q_token, q_head, mask_head, mask_token, mask_from, out_token, out_head;
  const int64_t *depth; /* NULL, or of a tree of tokens from mask_from on: query t counts as
                           standing at mask_from + depth[t], and the mask says what it sees there */
  int64_t queries, place; /* query t stands at place + t of the text */
  int64_t capacity, heads, kv_heads, head, value_head, window;
  float scale, softcap;
} Attention;

typedef struct {
  const float *q[TOGETHER];
  int64_t token[TOGETHER], head[TOGETHER], low[TOGETHER], high[TOGETHER]; /* sees keys low <= j < high */
  float top[TOGETHER], sum[TOGETHER];
  float *o; /* [rows, width] */
} Rows;

INLINE int64_t padded_width(int64_t size) { return (size + LANES - 1) / LANES * LANES; }

INLINE Floats hidden_outside(Floats s, int64_t key, int64_t low, int64_t high) {
  static const int32_t places[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  UNROLL for (int i = 0; i < PARTS; i++) {
    vi place;
    memcpy(&place, places + i * WIDTH, VECTOR_BYTES);
    place += (int32_t)key;
    const vi seen = (place >= (int32_t)low) & (place < (int32_t)high);
    s.v[i] = choose(seen, s.v[i], (vf){0} - INFINITY);
  }
  return s;
}

INLINE Floats masked(const Attention *a, Floats s, int64_t key, int64_t token, int64_t head) {
  const float *mask = a->mask + head * a->mask_head + token * a->mask_token;
  const int64_t end = a->place + a->queries - a->mask_from;
  for (int i = 0; i < PARTS; i++)
    for (int j = 0; j < WIDTH; j++) {
      const int64_t at = key + i * WIDTH + j - a->mask_from;
      if (at >= 0 && at < end) s.v[i][j] += mask[at];
    }
  return s;
}

/* weights [rows, KEYS] of keys [key, key + KEYS) against the running maxima, which are raised. */
INLINE void weigh(const Attention *a, const int rows, Rows *r, const float *tiles, int64_t key,
                  int64_t width, float *weights) {
  Floats s[TOGETHER][2];
  UNROLL for (int i = 0; i < rows; i++) s[i][0] = s[i][1] = zeros();
  const float *second = tiles + a->head * LANES;
  for (int64_t d = 0; d < a->head; d++) {
    const Floats k0 = load(tiles + d * LANES), k1 = load(second + d * LANES);
    UNROLL for (int i = 0; i < rows; i++) {
      s[i][0] = scaled_add(k0, r->q[i][d], s[i][0]);
      s[i][1] = scaled_add(k1, r->q[i][d], s[i][1]);
    }
  }
  UNROLL for (int i = 0; i < rows; i++) {
    for (int t = 0; t < 2; t++) {
      const int64_t at = key + t * LANES;
      UNROLL for (int p = 0; p < PARTS; p++) s[i][t].v[p] *= a->scale;
      if (a->softcap > 0) s[i][t] = capped(s[i][t], a->softcap);
      if (a->mask) s[i][t] = masked(a, s[i][t], at, r->token[i], r->head[i]);
      if (at < r->low[i] || at + LANES > r->high[i])
        s[i][t] = hidden_outside(s[i][t], at, r->low[i], r->high[i]);
    }
    const float top = highest_of(largest_of(s[i][0], s[i][1]));
    if (top > r->top[i]) {
      const float less = r->top[i] == -INFINITY ? 0 : expf(r->top[i] - top);
      r->top[i] = top, r->sum[i] *= less;
      for (int64_t c = 0; c < width; c++) r->o[i * width + c] *= less;
    }
    const Floats shift = all(r->top[i] == -INFINITY ? 0 : r->top[i]);
    const Floats first = exponential(subtract(s[i][0], shift));
    const Floats last = exponential(subtract(s[i][1], shift));
    store(weights + i * KEYS, first), store(weights + i * KEYS + LANES, last);
    r->sum[i] += sum_of(add(first, last));
  }
}

/* o [rows, width] += weights [rows, KEYS] times values [keys, width], for `parts` registers. */
INLINE void gather(const int rows, const int parts, const float *weights, const float *values,
                   int64_t keys, int64_t width, float *o) {
  Floats sum[TOGETHER][4];
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int c = 0; c < parts; c++) sum[i][c] = load(o + i * width + c * LANES);
  for (int64_t key = 0; key < keys; key++, values += width) {
    Floats v[4];
    UNROLL for (int c = 0; c < parts; c++) v[c] = load(values + c * LANES);
    UNROLL for (int i = 0; i < rows; i++)
      UNROLL for (int c = 0; c < parts; c++)
        sum[i][c] = scaled_add(v[c], weights[i * KEYS + key], sum[i][c]);
  }
  UNROLL for (int i = 0; i < rows; i++)
    UNROLL for (int c = 0; c < parts; c++) store(o + i * width + c * LANES, sum[i][c]);
}

INLINE void attend_rows(const Attention *a, const int rows, Rows *r, int64_t kv, int64_t from,
                        int64_t to) {
  const int64_t width = padded_width(a->value_head);
  const float *keys = a->keys + kv * a->capacity * a->head;
  const float *values = a->values + kv * a->capacity * width;
  float weights[TOGETHER * KEYS];
  for (int64_t key = from / KEYS * KEYS; key < to; key += KEYS) {
    weigh(a, rows, r, keys + key * a->head, key, width, weights);
    const int64_t begin = from > key ? from - key : 0, end = to - key < KEYS ? to - key : KEYS;
    const float *v = values + (key + begin) * width;
    int64_t c = 0;
    for (; c + 4 * LANES <= width; c += 4 * LANES)
      gather(rows, 4, weights + begin, v + c, end - begin, width, r->o + c);
    for (; c < width; c += LANES)
      gather(rows, 1, weights + begin, v + c, end - begin, width, r->o + c);
  }
}

#define ATTEND(n)                                                                              \
  static void attend_##n(const Attention *a, Rows *r, int64_t kv, int64_t from, int64_t to) {  \
    attend_rows(a, n, r, kv, from, to);                                                        \
  }
ATTEND(1) ATTEND(2)
#if TOGETHER == 6
ATTEND(3) ATTEND(4) ATTEND(5) ATTEND(6)
#endif
typedef void (*Attend)(const Attention *, Rows *, int64_t, int64_t, int64_t);
static const Attend attend_for[TOGETHER] = {
    attend_1, attend_2,
#if TOGETHER == 6
    attend_3, attend_4, attend_5, attend_6,
#endif
};

/* ---- how the work is divided ---- */

typedef struct {
  int64_t rows, blocks, items, splits, width;
} Division;

INLINE Division divided(const Attention *a, int64_t threads) {
  Division d;
  d.width = padded_width(a->value_head);
  d.rows = a->queries * (a->heads / a->kv_heads);
  d.blocks = (d.rows + TOGETHER - 1) / TOGETHER;
  d.items = a->kv_heads * d.blocks;
  const int64_t keys = a->place + a->queries;
  d.splits = d.items % threads && d.items < 4 * threads && keys >= 2 * FEWEST ? threads : 1;
  return d;
}

/* Floats of scratch that the team needs in common: rows' results, maxima and sums by split. */
INLINE int64_t attention_scratch(const Attention *a, int64_t threads) {
  const Division d = divided(a, threads);
  return d.splits > 1 ? d.items * d.splits * TOGETHER * (d.width + 2) : 0;
}

static void write_row(const Attention *a, int64_t token, int64_t head, const float *o, float top,
                      float sum) {
  float *out = a->out + token * a->out_token + head * a->out_head, factor = 1;
  if (a->sinks) {
    const float sink = a->sinks[head], highest = sink > top ? sink : top;
    factor = top == -INFINITY ? 0 : expf(top - highest);
    sum = sum * factor + expf(sink - highest);
  }
  factor = sum > 0 ? factor / sum : sum == 0 ? 0 : sum; /* a NaN stays one */
  for (int64_t c = 0; c < a->value_head; c++) out[c] = o[c] * factor;
}

INLINE int64_t lowest_key(const Attention *a, int64_t token, int64_t end) {
  if (a->depth) {
    end = a->mask_from + a->depth[token] + 1;
    if (a->window > 0 && end - a->window > a->mask_from) return a->mask_from;
  }
  return a->window > 0 && end > a->window ? end - a->window : 0;
}

static void attend_item(const Attention *a, const Division *d, int64_t item, int64_t split,
                        float *partial) {
  const int64_t group = a->heads / a->kv_heads, kv = item % a->kv_heads;
  const int64_t first = item / a->kv_heads * TOGETHER, left = d->rows - first;
  const int rows = left < TOGETHER ? (int)left : TOGETHER;
  float own[partial ? 1 : TOGETHER * d->width];
  Rows r = {.o = partial ? partial : own};
  memset(r.o, 0, rows * d->width * sizeof(float));
  int64_t low = INT64_MAX, high = 0;
  for (int i = 0; i < rows; i++) {
    const int64_t token = (first + i) / group, end = a->place + token + 1;
    r.token[i] = token, r.head[i] = kv * group + (first + i) % group;
    r.q[i] = a->q + token * a->q_token + r.head[i] * a->q_head;
    r.low[i] = lowest_key(a, token, end), r.high[i] = end;
    r.top[i] = -INFINITY, r.sum[i] = 0;
    low = r.low[i] < low ? r.low[i] : low, high = end > high ? end : high;
  }
  const int64_t each = ((high - low + d->splits - 1) / d->splits + KEYS - 1) / KEYS * KEYS;
  const int64_t begin = low / KEYS * KEYS + split * each;
  const int64_t from = begin > low ? begin : low;
  const int64_t to = split + 1 < d->splits && begin + each < high ? begin + each : high;
  if (from < to) attend_for[rows - 1](a, &r, kv, from, to);
  for (int i = 0; i < rows; i++) {
    if (partial) {
      partial[TOGETHER * d->width + i] = r.top[i];
      partial[TOGETHER * d->width + TOGETHER + i] = r.sum[i];
    } else {
      write_row(a, r.token[i], r.head[i], r.o + i * d->width, r.top[i], r.sum[i]);
    }
  }
}

/* One row of the item's partial results, [splits, TOGETHER * (width + 2)], joined in the first. */
static void join_row(const Attention *a, const Division *d, int64_t item, int64_t i,
                     float *partial) {
  const int64_t size = TOGETHER * (d->width + 2), tops = TOGETHER * d->width + i, sums = tops + TOGETHER;
  const int64_t group = a->heads / a->kv_heads, row = item / a->kv_heads * TOGETHER + i;
  if (row >= d->rows) return;
  float top = -INFINITY, sum = 0;
  for (int64_t s = 0; s < d->splits; s++)
    top = partial[s * size + tops] > top ? partial[s * size + tops] : top;
  float *o = partial + i * d->width;
  for (int64_t s = 0; s < d->splits; s++) {
    const float own = partial[s * size + tops];
    const float factor = own == -INFINITY ? 0 : expf(own - top);
    sum += partial[s * size + sums] * factor;
    const float *from = partial + s * size + i * d->width;
    for (int64_t c = 0; c < d->width; c++) o[c] = s ? o[c] + from[c] * factor : o[c] * factor;
  }
  write_row(a, row / group, item % a->kv_heads * group + row % group, o, top, sum);
}

/* Done together by a team of `threads`; scratch is theirs in common. */
static void attention_team(const Attention *a, int64_t threads, float *scratch) {
  const Division d = divided(a, threads);
  const int64_t size = TOGETHER * (d.width + 2);
#pragma omp for schedule(static, 1)
  for (int64_t i = 0; i < d.items * d.splits; i++)
    attend_item(a, &d, i / d.splits, i % d.splits, d.splits > 1 ? scratch + i * size : 0);
  if (d.splits == 1) return;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < d.items * TOGETHER; i++)
    join_row(a, &d, i / TOGETHER, i % TOGETHER, scratch + i / TOGETHER * d.splits * size);
}

/* New keys and values at `place` of the cache; token t, head h at t * token + h * head. */
typedef struct {
  const float *from;
  float *cache;
  int64_t token, stride, tokens, place, capacity, heads, head;
} Append;

INLINE void append_key(const Append *a, int64_t t, int64_t h) {
  const float *from = a->from + t * a->token + h * a->stride;
  const int64_t at = a->place + t, tile = at / LANES;
  float *to = a->cache + h * a->capacity * a->head + tile * LANES * a->head + at % LANES;
  for (int64_t d = 0; d < a->head; d++) to[d * LANES] = from[d];
}

INLINE void append_value(const Append *a, int64_t t, int64_t h) {
  const int64_t width = padded_width(a->head);
  float *to = a->cache + (h * a->capacity + a->place + t) * width;
  memcpy(to, a->from + t * a->token + h * a->stride, a->head * sizeof(float));
  memset(to + a->head, 0, (width - a->head) * sizeof(float));
}

static void append_team(const Append *a, const int keys) {
#pragma omp for schedule(static)
  for (int64_t i = 0; i < a->tokens * a->heads; i++) {
    if (keys)
      append_key(a, i / a->heads, i % a->heads);
    else
      append_value(a, i / a->heads, i % a->heads);
  }
}

#endif
