// Splits the joined projection into q and k | v, adds its bias, and turns q and k: one threadgroup for TOKENS tokens,
// whose angles it computes once for all heads. qkv (B, L, WIDTH), bias (WIDTH), q (B, L, HEADS, 2 HALF),
// kv (B, L, 2, KV, 2 HALF), all T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, KV, HALF, N elements a pack, TOKENS, THREADS, BIAS, SCALE and SCALE_LOW the attention factor.
constexpr int PACKS = HALF / N;
constexpr int ALL = HEADS + 2 * KV;
threadgroup Rotation table[TOKENS * HALF];

const uint first = threadgroup_position_in_grid.x * uint(TOKENS);
const uint length = uint(qkv_shape[1]);
const uint left = uint(qkv_shape[0]) * length - first;
const uint tokens = left < uint(TOKENS) ? left : uint(TOKENS);
for (uint i = thread_position_in_threadgroup.x; i < tokens * uint(HALF); i += uint(THREADS)) {
  const uint token = first + i / uint(HALF);
  const uint j = 3u * (i % uint(HALF));
  const uint batch = token / length;
  const int position = offset[uint(offset_shape[0]) == 1u ? 0u : batch] + int(token - batch * length);
  table[slot<N, HALF>(i)] = rotation(turns[j], turns[j + 1u], turns[j + 2u], position, float_of_bits(SCALE),
                                      float_of_bits(SCALE_LOW));
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

for (uint item = thread_position_in_threadgroup.x; item < tokens * uint(ALL * PACKS); item += uint(THREADS)) {
  const uint column = item % uint(PACKS) * uint(N);
  const uint head = item / uint(PACKS) % uint(ALL);
  const uint token = item / uint(ALL * PACKS);
  const uint from = ((first + token) * uint(ALL) + head) * uint(2 * HALF) + column;
  Pack<N> a = load<N>(qkv, from);
  Pack<N> b = load<N>(qkv, from + uint(HALF));
  if (BIAS) {
    const Pack<N> a_bias = load<N>(bias, head * uint(2 * HALF) + column);
    const Pack<N> b_bias = load<N>(bias, head * uint(2 * HALF) + column + uint(HALF));
    for (int k = 0; k < N; ++k) {
      a.v[k] = float(T(a.v[k] + a_bias.v[k]));
      b.v[k] = float(T(b.v[k] + b_bias.v[k]));
    }
  }
  if (head < uint(HEADS + KV)) {
    for (int k = 0; k < N; ++k) {
      const Rotation r = table[slot<N, HALF>(token * uint(HALF) + column + uint(k))];
      const float turned = difference(a.v[k], r.cos_high, r.cos_low, b.v[k], r.sin_high, r.sin_low);
      b.v[k] = difference(b.v[k], r.cos_high, r.cos_low, -a.v[k], r.sin_high, r.sin_low);
      a.v[k] = turned;
    }
  }
  if (head < uint(HEADS)) {
    const uint to = ((first + token) * uint(HEADS) + head) * uint(2 * HALF) + column;
    store<T>(q, to, a);
    store<T>(q, to + uint(HALF), b);
  } else {
    const uint to = ((first + token) * uint(2 * KV) + head - uint(HEADS)) * uint(2 * HALF) + column;
    store<T>(kv, to, a);
    store<T>(kv, to + uint(HALF), b);
  }
}
