// What rope.metal and qkv_rope.metal share: the angles that all heads of a token use, and heads turned by them.

// table: of each of a threadgroup's tokens, from `first` on, the cosine and sine of its HALF angles. offset: n_offsets (1, or
// one for each sequence of `length` tokens) first positions; turns, scale and scale_low: see rotation().
template <int HALF, int N, int THREADS, typename Table, typename Turns, typename Offset>
FUNCTION void fill_table(Table table, Turns turns, Offset offset, uint n_offsets, uint length, uint first, uint tokens,
                         float scale, float scale_low, uint id) {
  for (uint i = id; i < tokens * uint(HALF); i += uint(THREADS)) {
    const uint token = first + i / uint(HALF);
    const uint j = 3u * (i % uint(HALF));
    const uint batch = token / length;
    const int position = offset[n_offsets == 1u ? 0u : batch] + int(token - batch * length);
    table[slot<N, HALF>(i)] = rotation(turns[j], turns[j + 1u], turns[j + 2u], position, scale, scale_low);
  }
}

// Of one token: heads first, first + step, ..., N elements of each half from `column` on, with their bias added, and the
// first HEADS + KV turned by the angles from table[angle] on. x (tokens, HEADS + 2 KV, 2 HALF); bias a row of it; q (tokens,
// HEADS, 2 HALF) and kv (tokens, 2 KV, 2 HALF), which MLX allocates, so that they are aligned.
template <typename T, int HEADS, int KV, int HALF, int N, bool BIAS, bool ALIGNED, typename X, typename Bias, typename Q,
          typename Rest, typename Table>
FUNCTION void turn_heads(X x, Bias bias, Q q, Rest kv, Table table, uint token, uint angle, uint column, uint first,
                         uint step) {
  constexpr uint ALL = uint(HEADS + 2 * KV);
  Rotation turns[N];
  UNROLL
  for (int k = 0; k < N; ++k) {
    turns[k] = table[slot<N, HALF>(angle + uint(k))];
  }
  for (uint head = first; head < ALL; head += step) {
    const uint from = (token * ALL + head) * uint(2 * HALF) + column;
    Pack<N> a = load_aligned<N, ALIGNED>(x, from);
    Pack<N> b = load_aligned<N, ALIGNED>(x, from + uint(HALF));
    if (BIAS) {
      const Pack<N> a_bias = load_aligned<N, ALIGNED>(bias, head * uint(2 * HALF) + column);
      const Pack<N> b_bias = load_aligned<N, ALIGNED>(bias, head * uint(2 * HALF) + column + uint(HALF));
      UNROLL
      for (int k = 0; k < N; ++k) {
        a.v[k] += a_bias.v[k];
        b.v[k] += b_bias.v[k];
      }
      a = rounded<T>(a);
      b = rounded<T>(b);
    }
    if (head < uint(HEADS + KV)) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        const Rotation r = turns[k];
        const float turned = difference(a.v[k], r.cos_high, r.cos_low, b.v[k], r.sin_high, r.sin_low);
        b.v[k] = difference(b.v[k], r.cos_high, r.cos_low, -a.v[k], r.sin_high, r.sin_low);
        a.v[k] = turned;
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

// All heads of a threadgroup's tokens. A thread keeps its angles for several heads.
template <typename T, int HEADS, int KV, int HALF, int N, int TOKENS, int THREADS, bool BIAS, typename X, typename Bias,
          typename Q, typename Rest, typename Table>
FUNCTION void turn_tokens(X x, Bias bias, Q q, Rest kv, Table table, uint first, uint tokens, uint id) {
  constexpr uint PACKS = uint(HALF / N);
  constexpr uint SAME = uint(TOKENS) * PACKS;
  constexpr uint STEP = uint(THREADS) / SAME > 0u ? uint(THREADS) / SAME : 1u;
  constexpr bool WHOLE = N * sizeof(T) == 16;
  for (uint item = id; item < STEP * SAME; item += uint(THREADS)) {
    const uint token = item % SAME / PACKS;
    const uint column = item % PACKS * uint(N);
    const uint angle = token * uint(HALF) + column;
    if (token < tokens) {
      if (WHOLE && is_aligned(x) && is_aligned(bias)) {
        turn_heads<T, HEADS, KV, HALF, N, BIAS, WHOLE>(x, bias, q, kv, table, first + token, angle, column, item / SAME, STEP);
      } else {
        turn_heads<T, HEADS, KV, HALF, N, BIAS, false>(x, bias, q, kv, table, first + token, angle, column, item / SAME, STEP);
      }
    }
  }
}
