// Turns each head of x by its position: one threadgroup for TOKENS tokens, whose angles it computes once for all heads.
// x, out (B, L, HEADS, 2 HALF) T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, HALF, N elements a pack, TOKENS, THREADS, SCALE and SCALE_LOW the attention factor's bits.
constexpr int PACKS = HALF / N;
threadgroup Rotation table[TOKENS * HALF];

const uint first = threadgroup_position_in_grid.x * uint(TOKENS);
const uint length = uint(x_shape[1]);
const uint left = uint(x_shape[0]) * length - first;
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

for (uint item = thread_position_in_threadgroup.x; item < tokens * uint(HEADS * PACKS); item += uint(THREADS)) {
  const uint column = item % uint(PACKS) * uint(N);
  const uint angle = item / uint(HEADS * PACKS) * uint(HALF) + column;
  const uint at = (first * uint(HEADS) + item / uint(PACKS)) * uint(2 * HALF) + column;
  Pack<N> a = load<N>(x, at);
  Pack<N> b = load<N>(x, at + uint(HALF));
  for (int k = 0; k < N; ++k) {
    const Rotation r = table[slot<N, HALF>(angle + uint(k))];
    const float turned = difference(a.v[k], r.cos_high, r.cos_low, b.v[k], r.sin_high, r.sin_low);
    b.v[k] = difference(b.v[k], r.cos_high, r.cos_low, -a.v[k], r.sin_high, r.sin_low);
    a.v[k] = turned;
  }
  store<T>(out, at, a);
  store<T>(out, at + uint(HALF), b);
}
