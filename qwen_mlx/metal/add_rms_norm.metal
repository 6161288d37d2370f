// sums = T(x + residual), out = weight * T(sums / sqrt(mean(sums^2) + eps)). A threadgroup computes a row, which stays in
// registers. x, residual, sums, out (rows, D), weight (D), all T.
// Template: T, D, N elements a pack, THREADS a row, EPS the bits of eps.
constexpr int PACKS = (D + N * THREADS - 1) / (N * THREADS);
constexpr int SIMDS = THREADS / SIMD_WIDTH;
constexpr bool EARLY = D <= 2048;  // loads the weight with the rest; in longer rows its registers cost more
threadgroup float partial[SIMDS];

const uint first = thread_position_in_threadgroup.x * uint(N);
const uint row = threadgroup_position_in_grid.x * uint(D);
Pack<N> values[PACKS];
Pack<N> residuals[PACKS];
Pack<N> factors[PACKS];
UNROLL
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    values[p] = load<N>(x, row + i);
    residuals[p] = load<N>(residual, row + i);
    if (EARLY) {
      factors[p] = load<N>(weight, i);
    }
  }
}
float sum = 0.0f;
UNROLL
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    UNROLL
    for (int k = 0; k < N; ++k) {
      values[p].v[k] = float(T(values[p].v[k] + residuals[p].v[k]));
    }
    sum += sum_of_squares(values[p]);
    store<T>(sums, row + i, values[p]);
  }
}
sum = threadgroup_sum<SIMDS>(sum, &partial[0], thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
const Inverse scale = inverse_root_mean(sum, float(D), as_type<float>(EPS));
UNROLL
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    if (!EARLY) {
      factors[p] = load<N>(weight, i);
    }
    UNROLL
    for (int k = 0; k < N; ++k) {
      factors[p].v[k] = scaled_by<T>(values[p].v[k], scale, factors[p].v[k]);
    }
    store<T>(out, row + i, factors[p]);
  }
}
