// sums = T(x + residual), out = weight * T(sums / sqrt(mean(sums^2) + eps)): one threadgroup a row, kept in registers.
// x, residual, sums, out (rows, D), weight (D), all T.
// Template: T, D, N elements a pack, THREADS a row, EPS the bits of eps.
constexpr int PACKS = (D + N * THREADS - 1) / (N * THREADS);
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float partial[SIMDS];

const uint lane = thread_index_in_simdgroup;
const uint first = thread_position_in_threadgroup.x * uint(N);
const uint row = threadgroup_position_in_grid.x * uint(D);

Pack<N> values[PACKS];
float sum = 0.0f;
for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    values[p] = load<N>(x, row + i);
    const Pack<N> more = load<N>(residual, row + i);
    float part = 0.0f;
    for (int k = 0; k < N; ++k) {
      values[p].v[k] = float(T(values[p].v[k] + more.v[k]));
      part = metal::fma(values[p].v[k], values[p].v[k], part);
    }
    sum += part;
    store<T>(sums, row + i, values[p]);
  }
}
sum = metal::simd_sum(sum);
if (lane == 0u) {
  partial[simdgroup_index_in_threadgroup] = sum;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
sum = metal::simd_sum(lane < uint(SIMDS) ? partial[lane] : 0.0f);
const Inverse scale = inverse_root_mean(sum, float(D), float_of_bits(EPS));

for (int p = 0; p < PACKS; ++p) {
  const uint i = first + uint(p * N * THREADS);
  if (i < uint(D)) {
    Pack<N> scaled = load<N>(weight, i);
    for (int k = 0; k < N; ++k) {
      scaled.v[k] = scaled_by<T>(values[p].v[k], scale, scaled.v[k]);
    }
    store<T>(out, row + i, scaled);
  }
}
