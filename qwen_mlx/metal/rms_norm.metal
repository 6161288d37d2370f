// out = weight * T(x / sqrt(mean(x^2) + eps)). A threadgroup computes a row, which stays in registers.
// x (rows, D), weight (D), out (rows, D), all T. Template: T, D, N elements a pack, THREADS a row, EPS the bits of eps.
constexpr int PACKS = (D + N * THREADS - 1) / (N * THREADS);
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float partial[SIMDS];

const uint first = thread_position_in_threadgroup.x * uint(N);
const uint row = threadgroup_position_in_grid.x * uint(D);
Pack<N> values[PACKS];
float sum = 0.0f;
UNROLL
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    values[p] = load<N>(x, row + i);
    sum += sum_of_squares(values[p]);
  }
}
sum = threadgroup_sum<SIMDS>(sum, &partial[0], thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
const Inverse scale = inverse_root_mean(sum, float(D), as_type<float>(EPS));
UNROLL
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    Pack<N> scaled = load<N>(weight, i);
    UNROLL
    for (int k = 0; k < N; ++k) {
      scaled.v[k] = scaled_by<T>(values[p].v[k], scale, scaled.v[k]);
    }
    store<T>(out, row + i, scaled);
  }
}
