// A dense matrix w (rows, K) of T. Chunk: 16 bytes.
struct Dense {};

template <typename T, int BITS, int K>
FUNCTION constexpr int row_length(Dense) {
  return K;
}

template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename X, typename W>
FUNCTION Pack<R> row_dots(Dense, X x, Rows<R> rows, uint first, W w) {
  constexpr int N = 16 / sizeof(T);
  constexpr int CHUNKS = K / N;
  Pack<R> sums;
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = 0.0f;
  }
  for (int start = 0; start < CHUNKS; start += STEP * DEPTH) {
    Pack<N> values[R * DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        UNROLL
        for (int r = 0; r < R; ++r) {
          values[d * R + r] = load_aligned<N, ALIGNED>(w, rows.v[r] * uint(K) + chunk * uint(N));
        }
      }
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        const Pack<N> xs = load_aligned<N, ALIGNED>(x, place_of<T, STAGED>(chunk * uint(N)));
        UNROLL
        for (int r = 0; r < R; ++r) {
          UNROLL
          for (int k = 0; k < N; ++k) {
            sums.v[r] = metal::fma(values[d * R + r].v[k], xs.v[k], sums.v[r]);
          }
        }
      }
    }
  }
  return sums;
}
