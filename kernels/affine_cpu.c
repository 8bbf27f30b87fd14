/* Linear layers and row look-ups on affine integer weights, in float32.

   The weight [N, K] lies in tiles of 16 rows (planish.ir.interleaved): one vector register holds
   the same column of 16 rows, so sums need no horizontal adds and a row's scale is a lane.
   value = ((code - centre) - zero) * scale, where zero is the zero point minus the centre.

   Few tokens: `skinny` streams the codes once and keeps every token's sums in registers.
   Many tokens: `blocked` decodes a panel of rows into cache and multiplies it as a float32
   matrix product with register tiles, after Goto and van de Geijn 2008. */

#include "affine_team.h"

/* y = x @ weight.T + bias. Returns 0, or 1 when there is no memory. */
int planish_linear_affine(const float *x, const uint8_t *codes, const float *scale,
                          const float *zero, const float *bias, float *y, int64_t tokens,
                          int64_t rows, int64_t length, int64_t group, int64_t tile_bytes,
                          int64_t bits, int64_t rounded, int64_t threads) {
  const Linear a = {x,    codes,  scale, zero,  bias,       y,
                    tokens, rows, length, group, tile_bytes, bits, rounded};
  const int64_t size = affine_scratch(&a);
  float *scratch = size ? malloc(size * sizeof(float)) : 0;
  if (size && !scratch) return 1;
  const int alone = rows * length * (tokens > SKINNY_ROWS ? tokens : 1) < SERIAL_WORK;
#pragma omp parallel num_threads(threads) if (!alone && threads > 1)
  affine_team(&a, scratch);
  free(scratch);
  return 0;
}

/* out [count, length]: the rows `ids` of the weight. Returns 0, or 1 when an id is not a row. */
int planish_rows_affine(const int64_t *ids, const uint8_t *codes, const float *scale,
                        const float *zero, float *out, int64_t count, int64_t rows, int64_t length,
                        int64_t group, int64_t tile_bytes, int64_t bits, int64_t threads) {
  const int64_t groups = (length + group - 1) / group, per = 32 / bits;
  const int centre = 1 << (bits - 1), mask = (1 << bits) - 1;
  for (int64_t i = 0; i < count; i++)
    if (ids[i] < 0 || ids[i] >= rows) return 1;
#pragma omp parallel for schedule(static) num_threads(threads) if (count * length > SERIAL_WORK)
  for (int64_t i = 0; i < count; i++) {
    const int64_t tile = ids[i] / LANES, lane = ids[i] % LANES;
    const uint8_t *from = codes + tile * tile_bytes;
    float *to = out + i * length;
    for (int64_t g = 0; g < groups; g++) {
      const int64_t start = g * group, at = (tile * groups + g) * LANES + lane;
      const int64_t size = group < length - start ? group : length - start;
      const float z = zero ? zero[at] : 0.0f, s = scale[at];
      for (int64_t k = 0; k < size; k++) {
        uint32_t word;
        memcpy(&word, from + (k / per * LANES + lane) * 4, 4);
        const int64_t shift = k % 4 * 8 + k % per / 4 * bits;
        const int code = (int)(word >> shift & mask) - centre;
        to[start + k] = ((float)code - z) * s;
      }
      from += group_bytes((int)bits, size);
    }
  }
  return 0;
}
