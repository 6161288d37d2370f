// Splits the joined projection into q and k | v, adds its bias, and rotates q and k: N pairs a thread. qkv (B, L, WIDTH), bias
// (WIDTH), q (B, L, HEADS, 2 HALF), kv (B, L, 2, KV, 2 HALF), all T; table (1 or B, L, HALF, 2) float, cosine and sine of each
// pair's angle. Template: T, HEADS, KV, HALF, N, BIAS.
const uint item = thread_position_in_grid.x;
if (item < uint(qkv_shape[0] * qkv_shape[1] * (HEADS + 2 * KV) * (HALF / N))) {
  rotate_pack<T, HEADS, KV, HALF, N, BIAS>(qkv, bias, q, kv, table, uint(table_shape[0] * table_shape[1]), item);
}
