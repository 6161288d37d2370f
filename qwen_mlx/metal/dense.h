// A dense matrix w (rows, K) of T. Chunk: 16 bytes.
struct Dense {};

template <typename T, int K>
FUNCTION constexpr int chunk_count(Dense) {
  return K * int(sizeof(T)) / 16;
}

template <typename T, int R>
struct DenseChunk {
  Pack<16 / sizeof(T)> values[R];
};

template <typename T, int BITS, int GROUP, int K, int R, bool ALIGNED, typename W>
FUNCTION DenseChunk<T, R> load_chunk(Dense, Rows<R> rows, uint chunk, W w) {
  constexpr int N = 16 / sizeof(T);
  DenseChunk<T, R> found;
  UNROLL
  for (int r = 0; r < R; ++r) {
    found.values[r] = load_aligned<N, ALIGNED>(w, rows.v[r] * uint(K) + chunk * uint(N));
  }
  return found;
}

template <typename T, bool STAGED, int BITS, int R, bool ALIGNED, typename X>
FUNCTION Pack<R> add_chunk(Dense, DenseChunk<T, R> found, uint chunk, X x, Pack<R> sums) {
  constexpr int N = 16 / sizeof(T);
  const Pack<N> xs = load_aligned<N, ALIGNED>(x, place_of<T, STAGED>(chunk * uint(N)));
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (int k = 0; k < N; ++k) {
      sums.v[r] = metal::fma(found.values[r].v[k], xs.v[k], sums.v[r]);
    }
  }
  return sums;
}
