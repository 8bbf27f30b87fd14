/* A linear layer done together by the threads of a parallel region: which way for how many tokens. */

#ifndef AFFINE_TEAM_H
#define AFFINE_TEAM_H

#include "affine_blocked.h"
#include "affine_bytes.h"
#include "affine_registers.h"
#include "affine_rounded.h"
#include "affine_skinny.h"

/* Floats of scratch that the team needs in common. */
INLINE int64_t affine_scratch(const Linear *a) {
#ifdef HAS_BYTE_PRODUCTS
  if (a->rounded && a->tokens > SKINNY_ROWS) return rounded_floats(a);
#endif
  return a->tokens > SKINNY_ROWS ? packed_floats(a->tokens, a->length) : 0;
}

static void affine_team(const Linear *a, float *scratch) {
#ifdef HAS_BYTE_PRODUCTS
  if (a->rounded && a->tokens > SKINNY_ROWS) {
    rounded_team(a, scratch);
    return;
  }
#endif
  if (a->tokens > SKINNY_ROWS) {
    blocked_team(a, scratch);
    return;
  }
#ifdef HAS_BYTE_PRODUCTS
  if (a->tokens <= BYTE_ROWS && bytes_team(a)) return;
#endif
  skinny_team(a);
}

#endif
