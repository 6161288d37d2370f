// out = T(weight * T(x / sqrt(mean(x^2) + eps))) for a whole threadgroup; ends with a barrier.
template <typename T, int K, int THREADS, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void norm_row(X x, Weight weight, Out out, Partial partial, float eps, uint id, uint lane, uint simd) {
  constexpr int N = 16 / sizeof(T);
  constexpr int PACKS = (K / N + THREADS - 1) / THREADS;
  Pack<N> values[PACKS];
  float sum = 0.0f;
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      values[p] = load<N>(x, i);
      float part = 0.0f;
      for (int k = 0; k < N; ++k) {
        part = metal::fma(values[p].v[k], values[p].v[k], part);
      }
      sum += part;
    }
  }
  sum = metal::simd_sum(sum);
  if (lane == 0u) {
    partial[simd] = sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  sum = metal::simd_sum(lane < uint(THREADS / SIMD_WIDTH) ? partial[lane] : 0.0f);
  const Inverse scale = inverse_root_mean(sum, float(K), eps);
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      const Pack<N> factors = load<N>(weight, i);
      for (int k = 0; k < N; ++k) {
        out[i + uint(k)] = T(scaled_by<T>(values[p].v[k], scale, factors.v[k]));
      }
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}

// What the matrix-vector kernels do alike: a unit of R rows belongs to SPLIT simdgroups, whose sums meet in `partial`.
template <typename T, int BITS, int GROUP, int K, int R, int SPLIT, int DEPTH, typename X, typename Partial,
          typename W, typename... Rest>
FUNCTION void partial_sums(X x, Rows<R> rows, Partial partial, uint lane, uint simd, W w, Rest... rest) {
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  constexpr int STEP = SIMD_WIDTH * SPLIT;
  const Pack<R> sums = is_aligned(w) && is_aligned(x)
                           ? row_dots<T, BITS, GROUP, K, R, STEP, DEPTH, true>(x, rows, first, w, rest...)
                           : row_dots<T, BITS, GROUP, K, R, STEP, DEPTH, false>(x, rows, first, w, rest...);
  for (int r = 0; r < R; ++r) {
    const float sum = metal::simd_sum(sums.v[r]);
    if (lane == 0u) {
      partial[simd * uint(R) + uint(r)] = sum;
    }
  }
}

// Row r of the threadgroup's unit, after a barrier.
template <int R, int SPLIT, typename Partial>
FUNCTION float whole_sum(Partial partial, uint unit, uint r) {
  float sum = 0.0f;
  for (int s = 0; s < SPLIT; ++s) {
    sum += partial[(unit * uint(SPLIT) + uint(s)) * uint(R) + r];
  }
  return sum;
}
