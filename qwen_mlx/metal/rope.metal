// Turns each head of x by its position: one threadgroup a token, which computes its D / 2 angles once for all heads.
// x, out (B, L, HEADS, 2 HALF) T; turns (HALF, 3) uint32, see rotary.h; offset (1) or (B) int32, the first position.
// Template: T, HEADS, HALF, N elements a pack, THREADS, SCALE and SCALE_LOW the attention factor's bits.
constexpr int PACKS = HALF / N;
threadgroup float table[4 * HALF];

const uint token = threadgroup_position_in_grid.x;
const uint batch = token / uint(x_shape[1]);
const int position = offset[batch % uint(offset_shape[0])] + int(token % uint(x_shape[1]));
for (uint i = thread_position_in_threadgroup.x; i < uint(HALF); i += uint(THREADS)) {
  const Rotation r = rotation(turns[3u * i], turns[3u * i + 1u], turns[3u * i + 2u], position, float_of_bits(SCALE),
                              float_of_bits(SCALE_LOW));
  table[i] = r.cos_high;
  table[uint(HALF) + i] = r.cos_low;
  table[uint(2 * HALF) + i] = r.sin_high;
  table[uint(3 * HALF) + i] = r.sin_low;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);

for (uint item = thread_position_in_threadgroup.x; item < uint(HEADS * PACKS); item += uint(THREADS)) {
  const uint column = item % uint(PACKS) * uint(N);
  const uint head = (token * uint(HEADS) + item / uint(PACKS)) * uint(2 * HALF) + column;
  Pack<N> a = load<N>(x, head);
  Pack<N> b = load<N>(x, head + uint(HALF));
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
  store<T>(out, head, a);
  store<T>(out, head + uint(HALF), b);
}
