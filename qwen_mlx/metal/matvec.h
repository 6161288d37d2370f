// out = T(weight * T(x / sqrt(mean(x^2) + eps))) for a whole threadgroup, at place_of; ends with a barrier.
template <typename T, int K, int THREADS, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void norm_row(X x, Weight weight, Out out, Partial partial, float eps, uint id, uint lane, uint simd) {
  constexpr int N = 16 / sizeof(T);
  constexpr int PACKS = (K / N + THREADS - 1) / THREADS;
  Pack<N> values[PACKS];
  Pack<N> factors[PACKS];
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      values[p] = load<N>(x, i);
      factors[p] = load<N>(weight, i);
    }
  }
  float sum = 0.0f;
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    if ((id + uint(p * THREADS)) * uint(N) < uint(K)) {
      float part = 0.0f;
      UNROLL
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
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      Pack<N> normed;
      UNROLL
      for (int k = 0; k < N; ++k) {
        normed.v[k] = scaled_by<T>(values[p].v[k], scale, factors[p].v[k]);
      }
      store<T>(out, place_of<T, true>(i), normed);
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}

// Asks for the first 4 KiB of each row to be fetched while something else is computed.
template <int R, int LENGTH, typename W>
FUNCTION void fetch_ahead(Rows<R> rows, uint lane, W w) {
  constexpr uint STEP = FETCHED / uint(sizeof(w[0]));
  UNROLL
  for (int r = 0; r < R; ++r) {
    UNROLL
    for (uint i = 0u; i < 128u / FETCHED; ++i) {
      const uint at = (i * uint(SIMD_WIDTH) + lane) * STEP;
      if (at < uint(LENGTH)) {
        prefetch(w, rows.v[r] * uint(LENGTH) + at);
      }
    }
  }
}

// The products of a unit's R rows with x, for all its lanes. A unit belongs to SPLIT simdgroups, whose sums meet in
// `partial`; with more than one, all threads of the threadgroup have to come here.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int SPLIT, int DEPTH, typename X, typename Partial,
          typename Format, typename W, typename... Rest>
FUNCTION Pack<R> row_sums(Format format, X x, Rows<R> rows, Partial partial, uint lane, uint simd, W w, Rest... rest) {
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  constexpr int STEP = SIMD_WIDTH * SPLIT;
  Pack<R> sums = is_aligned(w) && is_aligned(x)
                     ? row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, true>(format, x, rows, first, w, rest...)
                     : row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, false>(format, x, rows, first, w, rest...);
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = metal::simd_sum(sums.v[r]);
  }
  if (SPLIT > 1) {
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (lane == 0u) {
      UNROLL
      for (int r = 0; r < R; ++r) {
        partial[simd * uint(R) + uint(r)] = sums.v[r];
      }
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    UNROLL
    for (int r = 0; r < R; ++r) {
      sums.v[r] = 0.0f;
      for (int s = 0; s < SPLIT; ++s) {
        sums.v[r] += partial[(simd / uint(SPLIT) * uint(SPLIT) + uint(s)) * uint(R) + uint(r)];
      }
    }
  }
  return sums;
}

// sums.v[r], r below R, where r is not a constant: as an index it would send the sums to memory, and without the addition
// the compiler makes it one.
template <int R>
FUNCTION float chosen(Pack<R> sums, uint r) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < R; ++i) {
    const float other = sums.v[i] + 0.0f;
    sum = r == uint(i) ? other : sum;
  }
  return sum;
}
