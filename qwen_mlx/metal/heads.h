// What rope.metal and qkv_rope.metal share: the angles that all heads of a token use, and heads turned by them.

// table: cosine and sine of a token's HALF angles, as Angles. offset: n_offsets (1, or one for each sequence of `length`
// tokens) first positions; turns, scale and scale_low: see rotation().
template <typename Angle, int HALF, int N, int THREADS, typename Table, typename Turns, typename Offset>
FUNCTION void fill_table(Table table, Turns turns, Offset offset, uint n_offsets, uint length, uint token, float scale,
                         float scale_low, uint id) {
  const uint batch = token / length;
  const int position = offset[n_offsets == 1u ? 0u : batch] + int(token - batch * length);
  for (uint i = id; i < uint(HALF); i += uint(THREADS)) {
    const uint j = 3u * i;
    table[slot<N, HALF>(i)] = rotation(Angle(), turns[j], turns[j + 1u], turns[j + 2u], position, scale, scale_low);
  }
}

// Of one token: heads first, first + STEP, ..., N elements of each half from `column` on, with their bias added, and the
// first HEADS + KV turned. x (tokens, HEADS + 2 KV, 2 HALF); bias a row of it; q (tokens, HEADS, 2 HALF) and kv (tokens,
// 2 KV, 2 HALF), which MLX allocates, so that they are aligned.
template <typename T, int HEADS, int KV, int HALF, int N, int STEP, bool BIAS, bool ALIGNED, typename X, typename Bias,
          typename Q, typename Rest, typename Table>
FUNCTION void turn_heads(X x, Bias bias, Q q, Rest kv, Table table, uint token, uint column, uint first) {
  constexpr uint ALL = uint(HEADS + 2 * KV);
  for (uint head = first; head < ALL; head += uint(STEP)) {
    const uint from = (token * ALL + head) * uint(2 * HALF) + column;
    const uint beside = head * uint(2 * HALF) + column;
    Pack<N> a = BIAS ? rounded_sum<T, N, ALIGNED>(x, from, bias, beside) : load_aligned<N, ALIGNED>(x, from);
    Pack<N> b = BIAS ? rounded_sum<T, N, ALIGNED>(x, from + uint(HALF), bias, beside + uint(HALF))
                     : load_aligned<N, ALIGNED>(x, from + uint(HALF));
    if (head < uint(HEADS + KV)) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        // Read here and not before: the registers let more threads be there.
        const typename RotationOf<sizeof(T)>::type r = table[slot<N, HALF>(column + uint(k))];
        const float first_half = turned(a.v[k], b.v[k], r);
        b.v[k] = turned(b.v[k], -a.v[k], r);
        a.v[k] = first_half;
      }
    }
    if (head < uint(HEADS)) {
      const uint to = (token * uint(HEADS) + head) * uint(2 * HALF) + column;
      store_aligned<T>(q, to, a);
      store_aligned<T>(q, to + uint(HALF), b);
    } else {
      const uint to = (token * uint(2 * KV) + head - uint(HEADS)) * uint(2 * HALF) + column;
      store_aligned<T>(kv, to, a);
      store_aligned<T>(kv, to + uint(HALF), b);
    }
  }
}

// All heads of a token.
template <typename T, int HEADS, int KV, int HALF, int N, int THREADS, bool BIAS, typename X, typename Bias, typename Q,
          typename Rest, typename Table>
FUNCTION void turn_token(X x, Bias bias, Q q, Rest kv, Table table, uint token, uint id) {
  constexpr int PACKS = HALF / N;
  constexpr int ALL = HEADS + 2 * KV;
  constexpr int AT_ONCE = THREADS / PACKS > 0 ? THREADS / PACKS : 1;
  constexpr int STEP = AT_ONCE < ALL ? AT_ONCE : ALL;
  constexpr bool WHOLE = N * sizeof(T) == 16;
  for (uint item = id; item < uint(STEP * PACKS); item += uint(THREADS)) {
    const uint column = item % uint(PACKS) * uint(N);
    const uint first = item / uint(PACKS);
    if (WHOLE && is_aligned(x) && is_aligned(bias)) {
      turn_heads<T, HEADS, KV, HALF, N, STEP, BIAS, WHOLE>(x, bias, q, kv, table, token, column, first);
    } else {
      turn_heads<T, HEADS, KV, HALF, N, STEP, BIAS, false>(x, bias, q, kv, table, token, column, first);
    }
  }
}
