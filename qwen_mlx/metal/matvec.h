// The parts that the matrix-vector kernels share. A unit is R rows of the matrix, or R / 2 pairs of rows; SPLIT simdgroups multiply it.

// A thread's packs of a vector that a whole threadgroup norms, the weights of the norm there, and the norm's factor.
template <typename T, int K, int THREADS>
struct Norm {
  enum { N = 16 / sizeof(T), PACKS = (K / N + THREADS - 1) / THREADS };
  Pack<N> values[PACKS];
  Pack<N> weights[PACKS];
  Inverse scale;
};

// Contains a barrier; `partial` has a float for each simdgroup.
template <typename T, int K, int THREADS, typename X, typename Weight, typename Partial>
FUNCTION Norm<T, K, THREADS> load_norm(X x, Weight weight, Partial partial, float eps, uint id, uint lane, uint simd) {
  constexpr int N = 16 / sizeof(T);
  constexpr int PACKS = (K / N + THREADS - 1) / THREADS;
  Norm<T, K, THREADS> norm;
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      norm.values[p] = load<N>(x, i);
      norm.weights[p] = load<N>(weight, i);
    }
  }
  float sum = 0.0f;
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    if ((id + uint(p * THREADS)) * uint(N) < uint(K)) {
      sum += sum_of_squares(norm.values[p]);
    }
  }
  norm.scale = inverse_root_mean(threadgroup_sum<THREADS / SIMD_WIDTH>(sum, partial, lane, simd), float(K), eps);
  return norm;
}

// out = T(weight * T(x / sqrt(mean(x^2) + eps))) for a StagedVector, by a whole threadgroup. Ends with a barrier.
template <typename T, int K, int THREADS, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void stage_norm(X x, Weight weight, Out out, Partial partial, float eps, uint id, uint lane, uint simd) {
  constexpr int N = 16 / sizeof(T);
  const Norm<T, K, THREADS> norm = load_norm<T, K, THREADS>(x, weight, partial, eps, id, lane, simd);
  UNROLL
  for (int p = 0; p < (K / N + THREADS - 1) / THREADS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      Pack<N> normed;
      UNROLL
      for (int k = 0; k < N; ++k) {
        normed.v[k] = scaled_by<T>(norm.values[p].v[k], norm.scale, norm.weights[p].v[k]);
      }
      store<T>(out, staged_index<T>(i), normed);
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}

// Returns sums.v[r] for a run-time r below R. Indexing would spill `sums` to memory, so this selects with an unrolled loop;
// `+ 0.0f` keeps the compiler from turning the loop back into an index.
template <int R>
FUNCTION float select_lane(Pack<R> sums, uint r) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < R; ++i) {
    const float other = sums.v[i] + 0.0f;
    sum = r == uint(i) ? other : sum;
  }
  return sum;
}

// Adds the sums of the SPLIT simdgroups of a unit, R from each in `partial`. Lane i gets the sums of rows i and i + R / 2.
template <int R, int SPLIT, typename Partial>
FUNCTION metal::float2 reduce_simdgroups(Partial partial, uint lane, uint simd) {
  metal::float2 sums = metal::float2(0.0f, 0.0f);
  for (int s = 0; s < SPLIT; ++s) {
    const uint from = (simd / uint(SPLIT) * uint(SPLIT) + uint(s)) * uint(R) + lane % uint(R);
    sums.x += partial[from];
    sums.y += partial[from + (lane < uint(R / 2) ? uint(R / 2) : 0u)];
  }
  return sums;
}

// A lane's share of the products of R rows with x: chunks first, first + STEP, ..., of which DEPTH are loaded at once.
template <int STEP, int DEPTH, int R, typename Matrix, typename X>
FUNCTION Pack<R> lane_products(Matrix matrix, X x, Rows<R> rows, uint first) {
  Pack<R> sums = zeros<R>();
  if (DEPTH == 1) {  // apart: a chunk that might not be loaded would hold its registers throughout the loop
    for (uint index = first; index < uint(Matrix::CHUNKS); index += uint(STEP)) {
      sums = matrix.add_chunk(matrix.load_chunk(rows, index), index, x, sums);
    }
  } else {
    for (int start = 0; start < int(Matrix::CHUNKS); start += STEP * DEPTH) {
      typename Matrix::Chunk chunks[DEPTH];
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        const uint index = first + uint(start + d * STEP);
        if (index < uint(Matrix::CHUNKS)) {
          chunks[d] = matrix.load_chunk(rows, index);
        }
      }
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        const uint index = first + uint(start + d * STEP);
        if (index < uint(Matrix::CHUNKS)) {
          sums = matrix.add_chunk(chunks[d], index, x, sums);
        }
      }
    }
  }
  return sums;
}

// The products of a unit's rows with x: lane i gets those of rows i and i + R / 2. With SPLIT above 1 it contains barriers, so
// that all threads of the threadgroup have to come here.
template <int SPLIT, int DEPTH, int R, typename Matrix, typename X, typename Partial>
FUNCTION metal::float2 unit_products(Matrix matrix, X x, Rows<R> rows, Partial partial, uint lane, uint simd) {
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  Pack<R> sums = lane_products<SIMD_WIDTH * SPLIT, DEPTH>(matrix, x, rows, first);
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = metal::simd_sum(sums.v[r]);
  }
  const metal::float2 mine = metal::float2(select_lane(sums, lane), select_lane(sums, lane + uint(R / 2)));
  if (SPLIT == 1) {
    return mine;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (lane < uint(R)) {
    partial[simd * uint(R) + lane] = mine.x;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  return reduce_simdgroups<R, SPLIT>(partial, lane, simd);
}
