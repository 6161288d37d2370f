// Cosine and sine of every pair's angle at one position, each as a sum of two floats: out (HALF, 4) float.
// turns (HALF, 3) uint32, see rotary.h; offset (1) int32. Template: HALF, SCALE and SCALE_LOW the attention factor.
const uint i = thread_position_in_grid.x;
if (i < uint(HALF)) {
  const Rotation r = rotation(turns[3u * i], turns[3u * i + 1u], turns[3u * i + 2u], offset[0], float_of_bits(SCALE),
                              float_of_bits(SCALE_LOW));
  out[4u * i] = r.cos_high;
  out[4u * i + 1u] = r.cos_low;
  out[4u * i + 2u] = r.sin_high;
  out[4u * i + 3u] = r.sin_low;
}
