// Rotates each head of x by its position: N pairs a thread. x, out (B, L, HEADS, 2 HALF) T; table (1 or B, L, HALF, 2) float,
// cosine and sine of each pair's angle. Template: T, HEADS, HALF, N.
const uint item = thread_position_in_grid.x;
if (item < uint(x_shape[0] * x_shape[1] * HEADS * (HALF / N))) {
  rotate_pack<T, HEADS, 0, HALF, N, false>(x, x, out, out, table, uint(table_shape[0] * table_shape[1]), item);
}
