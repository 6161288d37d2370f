// A dense matrix w (rows, K) of T. A chunk is 16 bytes of a row.
template <typename T, int K, int R, typename W>
struct Dense {
  enum { N = 16 / sizeof(T), CHUNKS = K / N };
  struct Chunk {
    Pack<N> values[R];
  };
  W w;

  FUNCTION Chunk load_chunk(Rows<R> rows, uint index) const {
    Chunk chunk;
    UNROLL
    for (int r = 0; r < R; ++r) {
      chunk.values[r] = load<N>(w, rows.v[r] * uint(K) + index * uint(N));
    }
    return chunk;
  }

  template <typename X>
  FUNCTION Pack<R> add_chunk(Chunk chunk, uint index, X x, Pack<R> sums) const {
    const Pack<N> xs = x.at(index * uint(N));
    UNROLL
    for (int r = 0; r < R; ++r) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        sums.v[r] = metal::fma(chunk.values[r].v[k], xs.v[k], sums.v[r]);
      }
    }
    return sums;
  }
};

template <typename T, int K, int R, typename W>
FUNCTION Dense<T, K, R, W> dense(W w) {
  return {w};
}
