// The rotation of whole heads, for rope.metal and qkv_rope.metal.

// N pairs of one head: pack `item` of x (tokens, HEADS + 2 KV, 2 HALF), with their bias, a row of x, added where BIAS; the first
// HEADS + KV heads are rotated. q (tokens, HEADS, 2 HALF), kv (tokens, 2 KV, 2 HALF); table (rows, HALF, 2) float, rows being
// the tokens of one sequence, or of all.
template <typename T, int HEADS, int KV, int HALF, int N, bool BIAS, typename X, typename Bias, typename Q, typename KVs,
          typename Table>
FUNCTION void rotate_pack(X x, Bias bias, Q q, KVs kv, Table table, uint rows, uint item) {
  constexpr uint ALL = uint(HEADS + 2 * KV);
  constexpr int PAIRS = N % 2 == 0 ? 2 : 1;  // of cosine and sine that are loaded at once
  const uint column = item % uint(HALF / N) * uint(N);
  const uint row = item / uint(HALF / N);
  const uint token = row / ALL;
  const uint head = row % ALL;
  const uint from = row * uint(2 * HALF) + column;
  Pack<N> a = load<N>(x, from);
  Pack<N> b = load<N>(x, from + uint(HALF));
  if (BIAS) {
    const Pack<N> a_bias = load<N>(bias, head * uint(2 * HALF) + column);
    const Pack<N> b_bias = load<N>(bias, head * uint(2 * HALF) + column + uint(HALF));
    UNROLL
    for (int k = 0; k < N; ++k) {
      a.v[k] = float(T(a.v[k] + a_bias.v[k]));
      b.v[k] = float(T(b.v[k] + b_bias.v[k]));
    }
  }
  if (head < uint(HEADS + KV)) {
    const uint angle = token % rows * uint(HALF) + column;
    UNROLL
    for (int k = 0; k < N; k += PAIRS) {
      const Pack<2 * PAIRS> turn = load<2 * PAIRS>(table, 2u * (angle + uint(k)));
      UNROLL
      for (int i = 0; i < PAIRS; ++i) {
        const float first_half = rotated(a.v[k + i], b.v[k + i], turn.v[2 * i], turn.v[2 * i + 1]);
        b.v[k + i] = rotated(b.v[k + i], -a.v[k + i], turn.v[2 * i], turn.v[2 * i + 1]);
        a.v[k + i] = first_half;
      }
    }
  }
  if (head < uint(HEADS)) {
    const uint to = (token * uint(HEADS) + head) * uint(2 * HALF) + column;
    store<T>(q, to, a);
    store<T>(q, to + uint(HALF), b);
  } else {
    const uint to = (token * uint(2 * KV) + head - uint(HEADS)) * uint(2 * HALF) + column;
    store<T>(kv, to, a);
    store<T>(kv, to + uint(HALF), b);
  }
}
