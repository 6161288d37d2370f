// add_rms_norm for one row, of arrays that lie at multiples of 16 bytes if ALIGNED.
template <typename T, int D, int N, int THREADS, bool ALIGNED, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void add_norm_row(X x, X residual, Weight weight, Out sums, Out out, Partial partial, float eps, uint row, uint first,
                           uint lane, uint simd) {
  constexpr int PACKS = (D + N * THREADS - 1) / (N * THREADS);
  constexpr int SIMDS = THREADS / SIMD_WIDTH;
  constexpr bool EARLY = D <= 2048;  // the weight is asked for with the rest; in long rows its registers cost more
  Pack<N> values[PACKS];
  Pack<N> more[PACKS];
  Pack<N> factors[PACKS];
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = first + uint(p * N * THREADS);
    if (i < uint(D)) {
      values[p] = load_aligned<N, ALIGNED>(x, row + i);
      more[p] = load_aligned<N, ALIGNED>(residual, row + i);
      if (EARLY) {
        factors[p] = load_aligned<N, ALIGNED>(weight, i);
      }
    }
  }
  float sum = 0.0f;
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = first + uint(p * N * THREADS);
    if (i < uint(D)) {
      float part = 0.0f;
      UNROLL
      for (int k = 0; k < N; ++k) {
        values[p].v[k] = float(T(values[p].v[k] + more[p].v[k]));
        part = metal::fma(values[p].v[k], values[p].v[k], part);
      }
      sum += part;
      store_aligned<T>(sums, row + i, values[p]);
    }
  }
  sum = metal::simd_sum(sum);
  if (lane == 0u) {
    partial[simd] = sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  sum = metal::simd_sum(lane < uint(SIMDS) ? partial[lane] : 0.0f);
  const Inverse scale = inverse_root_mean(sum, float(D), eps);
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = first + uint(p * N * THREADS);
    if (i < uint(D)) {
      Pack<N> scaled;
      if (EARLY) {
        scaled = factors[p];
      } else {
        scaled = load_aligned<N, ALIGNED>(weight, i);
      }
      UNROLL
      for (int k = 0; k < N; ++k) {
        scaled.v[k] = scaled_by<T>(values[p].v[k], scale, scaled.v[k]);
      }
      store_aligned<T>(out, row + i, scaled);
    }
  }
}

// add_rms_norm for one row. Where the arrays lie is asked once, not at each access, so that nothing stands between the loads.
template <typename T, int D, int N, int THREADS, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void add_norm(X x, X residual, Weight weight, Out sums, Out out, Partial partial, float eps, uint row, uint first,
                       uint lane, uint simd) {
  constexpr bool WHOLE = N * sizeof(T) == 16;
  if (WHOLE && is_aligned(x) && is_aligned(residual) && is_aligned(weight)) {
    add_norm_row<T, D, N, THREADS, WHOLE>(x, residual, weight, sums, out, partial, eps, row, first, lane, simd);
  } else {
    add_norm_row<T, D, N, THREADS, false>(x, residual, weight, sums, out, partial, eps, row, first, lane, simd);
  }
}
