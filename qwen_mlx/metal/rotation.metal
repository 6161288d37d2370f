// Cosine and sine of every pair's angle at one position, each as a sum of two floats: out (HALF, 4) float.
// turns (HALF, 3) uint32, see rotary.h; place (2 or more) int32, the position first. here (4) int32: the first two of place,
// in the GPU's own memory. Template: HALF, SCALE and SCALE_LOW the attention factor.
const uint i = thread_position_in_grid.x;
if (i < 4u) {
  here[i] = i < 2u ? place[i] : 0;
}
if (i < uint(HALF)) {
  const Rotation r = rotation(Rotation(), turns[3u * i], turns[3u * i + 1u], turns[3u * i + 2u], place[0],
                              float_of_bits(SCALE), float_of_bits(SCALE_LOW));
  out[4u * i] = r.cos_high;
  out[4u * i + 1u] = r.cos_low;
  out[4u * i + 2u] = r.sin_high;
  out[4u * i + 3u] = r.sin_low;
}
