// The products of a unit of 16 rows. A simdgroup's rows come through a ring of DEPTH stages, RING words each, in threadgroup
// memory. The next stages are copied while one is multiplied, without a register for them, and the first ones before the vector
// is normed. A stage is 256 elements of 16 rows, so that 128 bytes of codes in a row are read together.

// The rows of a unit and the vector x. `ring` is this simdgroup's alone; it has stages simd % SPLIT, simd % SPLIT + SPLIT, ...
template <int SPLIT, int DEPTH, int RING, typename Matrix, typename X, typename Rows, typename Ring>
struct TileUnit {
  Matrix matrix;
  X x;
  Rows rows;
  Ring ring;
  uint lane, simd;

  // Starts to copy the simdgroup's stage n, or an empty batch after the last.
  FUNCTION void start_stage(uint n) const {
    const uint stage = simd % uint(SPLIT) + n * uint(SPLIT);
    const uint at = n % uint(DEPTH) * uint(RING);
    if (stage < uint(Matrix::STAGES)) {
      matrix.start_codes(rows, stage, ring, at, lane);
      const uint from = stage * 256u + lane * 8u;
      if (!X::STAGED && from < uint(Matrix::COLUMNS)) {
        start_copy<8>(ring, at + uint(RING - VECTOR_WORDS) + lane * 4u, x.x, from);
      }
    }
    end_batch();
  }

  FUNCTION void start() const {
    UNROLL
    for (int n = 0; n < DEPTH - 1; ++n) {
      start_stage(uint(n));
    }
  }

  // The products, after start(): lane i gets those of rows i and i + 8. group_sums: the sums of each 16 elements of a normed
  // vector. With SPLIT above 1 all threads of the threadgroup have to come here.
  template <typename Sums, typename Partial>
  FUNCTION metal::float2 products(Sums group_sums, Partial partial) const {
    Pack<2> sums = zeros<2>();
    uint n = 0u;
    for (uint stage = simd % uint(SPLIT); stage < uint(Matrix::STAGES); stage += uint(SPLIT)) {
      wait_for_batches<DEPTH - 2>();
      metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
      start_stage(n + uint(DEPTH - 1));
      const uint at = n % uint(DEPTH) * uint(RING);
      sums = matrix.add_stage(rows, stage, x, group_sums, ring, at, at + uint(RING - VECTOR_WORDS), lane, sums);
      ++n;
    }
    UNROLL
    for (int r = 0; r < 2; ++r) {
      sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(1));
      sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(2));
    }
    if (SPLIT > 1) {
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      if (lane % 4u < 2u) {
        partial[simd * 16u + lane / 4u + lane % 4u * 8u] = lane % 4u == 0u ? sums.v[0] : sums.v[1];
      }
      metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
      return reduce_simdgroups<16, SPLIT>(partial, lane, simd);
    }
    const float low = metal::simd_shuffle(sums.v[0], ushort(lane % 8u * 4u));
    const float high = metal::simd_shuffle(sums.v[1], ushort(lane % 8u * 4u));
    return metal::float2(lane < 8u ? low : high, high);
  }
};

template <int SPLIT, int DEPTH, int RING, int APART, int COUNT, typename Matrix, typename X, typename Ring>
FUNCTION TileUnit<SPLIT, DEPTH, RING, Matrix, X, StageRows<APART, COUNT>, Ring> tile_unit(Matrix matrix, X x, uint unit, Ring ring,
                                                                                      uint lane, uint simd) {
  return {matrix, x, {unit}, ring, lane, simd};
}

// As stage_norm, in the order of the matrix's codes, with the sums of each 16 elements of out in `group_sums`.
template <typename T, int K, int THREADS, typename Matrix, typename X, typename Weight, typename Out, typename Sums,
          typename Partial>
FUNCTION void stage_tiles(Matrix, X x, Weight weight, Out out, Sums group_sums, Partial partial, float eps, uint id, uint lane,
                          uint simd) {
  constexpr int N = 8;
  const Norm<T, K, THREADS> norm = load_norm<T, K, THREADS>(x, weight, partial, eps, id, lane, simd);
  UNROLL
  for (int p = 0; p < (K / N + THREADS - 1) / THREADS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    float sum = 0.0f;
    if (i < uint(K)) {
      Pack<N> normed;
      UNROLL
      for (int k = 0; k < N; ++k) {
        const int from = Matrix::Order::staged_element(k);
        normed.v[k] = scaled_by<T>(norm.values[p].v[from], norm.scale, norm.weights[p].v[from]);
      }
      normed = rounded<T>(normed);
      store<T>(out, staged_index<T>(i), normed);
      UNROLL
      for (int k = 0; k < N; ++k) {
        sum += normed.v[k];
      }
    }
    sum += metal::simd_shuffle_xor(sum, ushort(1));
    if (i < uint(K) && lane % 2u == 0u) {
      group_sums[i / 16u] = sum;
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}
