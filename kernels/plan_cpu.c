/* A plan: the steps of a program one after the other, by one team of threads, without returning.

   Waking threads and calling from Python cost as much as a small step; here the threads meet at a
   barrier after each step and go on. A step's operands lie at fixed addresses, one row of
   `token` floats for every token, so that one plan serves every number of tokens up to what its
   buffers hold. */

#include "affine_team.h"
#include "attention_blocks.h"
#include "row_steps.h"

#ifdef _OPENMP
extern int omp_get_num_threads(void);
#else
static int omp_get_num_threads(void) { return 1; }
#endif

enum { LINEAR, DENSE, RMS_NORM, LAYER_NORM, ROTARY, POINTWISE_STEP, APPEND_KEY, APPEND_VALUE,
       ATTENTION };

typedef struct {
  int64_t kind;
  const void *in[6];
  void *out;
  int64_t size[16];
  double number[2];
} Step;

/* Tokens [first, first + tokens) of a call that stands at `past` in the text. caches: addresses
   of keys and values by layer, [2 * layers], which move when they grow; mask: of the call, or 0,
   [tokens of the call, tokens of the call], between its own tokens; depth: theirs, of a tree. */
typedef struct {
  int64_t first, tokens, past, capacity, all;
  float **caches;
  const float *mask;
  const int64_t *depth;
} Call;

static Extent extent_of(const Step *s, const Call *c) {
  Extent e = {c->tokens, s->size[0], s->size[1]};
  for (int i = 0; i < 4; i++) e.token[i] = s->size[2 + i], e.head[i] = s->size[6 + i];
  return e;
}

static Linear linear_of(const Step *s, const Call *c) {
  const int64_t *n = s->size;
  const Linear a = {(const float *)s->in[0] + c->first * n[1], s->in[1], s->in[2], s->in[3],
                    s->in[4], (float *)s->out + c->first * n[0], c->tokens, n[0], n[1], n[2],
                    n[3], n[4], n[5]};
  return a;
}

static Attention attention_of(const Step *s, const Call *c) {
  const int64_t *n = s->size;
  Attention a = {0};
  a.q = (const float *)s->in[0] + c->first * n[0], a.q_token = n[0], a.q_head = n[1];
  a.keys = c->caches[2 * n[8]], a.values = c->caches[2 * n[8] + 1], a.sinks = s->in[1];
  a.out = (float *)s->out + c->first * n[2], a.out_token = n[2], a.out_head = n[3];
  a.heads = n[4], a.kv_heads = n[5], a.head = n[6], a.value_head = n[7], a.window = n[9];
  a.queries = c->tokens, a.place = c->past + c->first, a.capacity = c->capacity;
  a.scale = s->number[0], a.softcap = s->number[1];
  if (c->mask) {
    a.mask = c->mask + c->first * c->all, a.mask_token = c->all, a.mask_from = c->past;
    a.depth = c->depth ? c->depth + c->first : 0;
  }
  return a;
}

static Append append_of(const Step *s, const Call *c, const int keys) {
  const int64_t *n = s->size;
  const Append a = {(const float *)s->in[0] + c->first * n[0], c->caches[2 * n[4] + !keys], n[0],
                    n[1], c->tokens, c->past + c->first, c->capacity, n[2], n[3]};
  return a;
}

static int64_t scratch_of(const Step *s, const Call *c, int64_t threads) {
  if (s->kind == LINEAR) {
    const Linear a = linear_of(s, c);
    return affine_scratch(&a);
  }
  if (s->kind == ATTENTION) {
    const Attention a = attention_of(s, c);
    int64_t most = 0; /* the team may be smaller than what was asked for */
    for (int64_t t = 1; t <= threads; t++) {
      const int64_t size = attention_scratch(&a, t);
      most = size > most ? size : most;
    }
    return most;
  }
  return 0;
}

#define MOVED(pointer, place) ((pointer) ? (const float *)(pointer) + c->first * e.token[place] : 0)

static void step_team(const Step *s, const Call *c, float *scratch) {
  const Extent e = extent_of(s, c);
  float *out = (float *)s->out + c->first * e.token[3];
  const float *a = MOVED(s->in[0], 0), *b = MOVED(s->in[1], 1);
  switch (s->kind) {
    case LINEAR: {
      const Linear l = linear_of(s, c);
      affine_team(&l, scratch);
      break;
    }
    case DENSE:
      dense_team(a, e.token[0], s->in[1], s->in[2], out, e.token[3], c->tokens, s->size[10],
                 s->size[11]);
      break;
    case RMS_NORM:
      rms_norm_team(&e, a, s->in[1], out, s->number[0], s->number[1]);
      break;
    case LAYER_NORM:
      layer_norm_team(&e, a, s->in[1], s->in[2], out, s->number[0]);
      break;
    case ROTARY:
      rotary_team(&e, a, b, MOVED(s->in[2], 2), out, s->size[10], s->size[11]);
      break;
    case POINTWISE_STEP:
      pointwise_team(&e, a, b, out, s->size[10]);
      break;
    case APPEND_KEY:
    case APPEND_VALUE: {
      const Append p = append_of(s, c, s->kind == APPEND_KEY);
      append_team(&p, s->kind == APPEND_KEY);
      break;
    }
    case ATTENTION: {
      const Attention t = attention_of(s, c);
      attention_team(&t, omp_get_num_threads(), scratch);
      break;
    }
  }
}

/* Steps so small that one thread does them faster than several agree on who does what. */
static int is_small(const Step *s, const Call *c) {
  const int heavy = s->kind == LINEAR || s->kind == DENSE || s->kind == ATTENTION;
  return !heavy && c->tokens <= SKINNY_ROWS;
}

static void steps_team(const Step *steps, int64_t count, const Call *call, float *scratch) {
  for (int64_t i = 0, end; i < count; i = end) {
    for (end = i; end < count && is_small(steps + end, call);) end++;
    if (end == i) {
      step_team(steps + end++, call, scratch);
      continue;
    }
#pragma omp master
    {
#pragma omp parallel num_threads(1)
      for (int64_t j = i; j < end; j++) step_team(steps + j, call, scratch);
    }
#pragma omp barrier
  }
}

/* Runs `count` steps; returns 0, or 1 when there is no memory. */
int planish_run_steps(const Step *steps, int64_t count, const Call *call, int64_t threads) {
  int64_t most = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t size = scratch_of(steps + i, call, threads);
    most = size > most ? size : most;
  }
  float *scratch = most ? malloc(most * sizeof(float)) : 0;
  if (most && !scratch) return 1;
#pragma omp parallel num_threads(threads) if (threads > 1)
  steps_team(steps, count, call, scratch);
  free(scratch);
  return 0;
}
