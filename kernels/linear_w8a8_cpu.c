/* Linear layers on int8 activations and affine integer weights, with exact integer sums.

   The weight [N, K] lies in tiles of 16 rows (planish.ir.interleaved). Within a group,
   sum (u - centre)(x - zx) = sum u x - centre * sum x - zx * sum (u - centre), all in 32 bits:
   bytes are multiplied as they are, and what the centres and zero points add is known before. */

#include "w8a8_blocks.h"

/* y [tokens, rows] = ((codes - x_zero) * x_scale) @ weight.T + bias. codes: [tokens, length];
   x_scale, x_zero: one a token, or one for all (each = 0); sums: of the weight's codes less the
   centre [tiles, groups, 16], read if there is an x_zero. Returns 0, or 1 when there is no memory. */
int planish_linear_w8a8(const int8_t *codes, const float *x_scale, const int32_t *x_zero,
                        int64_t each, const uint8_t *weight, const float *scale, const float *zero,
                        const int32_t *sums, const float *bias, float *y, int64_t tokens,
                        int64_t rows, int64_t length, int64_t group, int64_t tile_bytes,
                        int64_t bits, int64_t threads) {
  Bytes a = {codes, x_scale, x_zero, each, weight, scale, zero, sums, bias, y,
             tokens, rows, length, group, tile_bytes, bits, length, 0};
  const int64_t memory = w8a8_scratch(&a);
  char *scratch = malloc(memory);
  if (!scratch) return 1;
  const int alone = rows * length * tokens < 4 * SERIAL_WORK;
#pragma omp parallel num_threads(threads) if (!alone && threads > 1)
  w8a8_team(&a, scratch);
  free(scratch);
  return 0;
}

/* codes [tokens, length] and scale [tokens] of x: the nearest of 255 steps of each row's own. */
void planish_quantize_rows(const float *x, int8_t *codes, float *scale, int64_t tokens,
                           int64_t length, int64_t threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (tokens * length > SERIAL_WORK)
  for (int64_t t = 0; t < tokens; t++)
    scale[t] = quantize_row(x + t * length, codes + t * length, length);
}

/* out [count, rows]: `count` columns of the weight, as the values that they stand for. */
void planish_affine_columns(const int64_t *columns, const uint8_t *codes, const float *scale,
                            const float *zero, float *out, int64_t count, int64_t rows,
                            int64_t length, int64_t group, int64_t tile_bytes, int64_t bits) {
  const int64_t groups = (length + group - 1) / group, per = codes_in_word((int)bits);
  const int centre = 1 << (bits - 1), mask = (1 << bits) - 1;
  for (int64_t i = 0; i < count; i++) {
    const int64_t g = columns[i] / group, k = columns[i] % group;
    const int64_t shift = k % 4 * 8 + k % per / 4 * bits;
    const uint8_t *from = codes + g * group_bytes((int)bits, group) + k / per * LANES * 4;
    for (int64_t row = 0; row < rows; row++) {
      const int64_t tile = row / LANES, lane = row % LANES, at = (tile * groups + g) * LANES + lane;
      uint32_t word;
      memcpy(&word, from + tile * tile_bytes + lane * 4, 4);
      const int code = (int)(word >> shift & mask) - centre;
      out[i * rows + row] = ((float)code - (zero ? zero[at] : 0)) * scale[at];
    }
  }
}
