// Splits the joined projection into q and k | v, adds its bias, and turns q and k: one threadgroup a token.
// qkv (B, L, WIDTH), bias (WIDTH), q (B, L, HEADS, 2 HALF), kv (B, L, 2, KV, 2 HALF), all T;
// turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, KV, HALF, N elements a pack, THREADS, BIAS, SCALE and SCALE_LOW the attention factor's bits.
constexpr int PACKS = HALF / N;
constexpr int WIDTH = (HEADS + 2 * KV) * 2 * HALF;
threadgroup float table[4 * HALF];

const uint token = threadgroup_position_in_grid.x;
const uint batch = token / uint(qkv_shape[1]);
const int position = offset[batch % uint(offset_shape[0])] + int(token % uint(qkv_shape[1]));
for (uint i = thread_position_in_threadgroup.x; i < uint(HALF); i += uint(THREADS)) {
  const Rotation r = rotation(turns[3u * i], turns[3u * i + 1u], turns[3u * i + 2u], position, float_of_bits(SCALE),
                              float_of_bits(SCALE_LOW));
  table[i] = r.cos_high;
  table[uint(HALF) + i] = r.cos_low;
  table[uint(2 * HALF) + i] = r.sin_high;
  table[uint(3 * HALF) + i] = r.sin_low;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

for (uint item = thread_position_in_threadgroup.x; item < uint((HEADS + 2 * KV) * PACKS); item += uint(THREADS)) {
  const uint head = item / uint(PACKS);
  const uint column = item % uint(PACKS) * uint(N);
  const uint from = head * uint(2 * HALF) + column;
  Pack<N> a = load<N>(qkv, token * uint(WIDTH) + from);
  Pack<N> b = load<N>(qkv, token * uint(WIDTH) + from + uint(HALF));
  if (BIAS) {
    const Pack<N> a_bias = load<N>(bias, from);
    const Pack<N> b_bias = load<N>(bias, from + uint(HALF));
    for (int k = 0; k < N; ++k) {
      a.v[k] = float(T(a.v[k] + a_bias.v[k]));
      b.v[k] = float(T(b.v[k] + b_bias.v[k]));
    }
  }
  if (head < uint(HEADS + KV)) {
    for (int k = 0; k < N; ++k) {
      const uint i = column + uint(k);
      const float c = table[i];
      const float c_low = table[uint(HALF) + i];
      const float s = table[uint(2 * HALF) + i];
      const float s_low = table[uint(3 * HALF) + i];
      const float turned = difference(a.v[k], c, c_low, b.v[k], s, s_low);
      b.v[k] = difference(b.v[k], c, c_low, -a.v[k], s, s_low);
      a.v[k] = turned;
    }
  }
  if (head < uint(HEADS)) {
    const uint to = token * uint(HEADS * 2 * HALF) + from;
    store<T>(q, to, a);
    store<T>(q, to + uint(HALF), b);
  } else {
    const uint to = token * uint(2 * KV * 2 * HALF) + from - uint(HEADS * 2 * HALF);
    store<T>(kv, to, a);
    store<T>(kv, to + uint(HALF), b);
  }
}
