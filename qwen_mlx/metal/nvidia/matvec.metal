// ../matvec.metal with tiles (tile_sums.h): a unit is 16 rows, and every threadgroup has one round of units.
// Template: T, K, ROWS, SPLIT, DEPTH, RING, THREADS, NORM, ADD, EPS, and the packing's.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float partial[SIMDS * 16];
threadgroup Staged<uint> ring[SIMDS * RING * DEPTH / 4];
threadgroup float group_sums[NORM ? K / 16 : 1];
threadgroup Staged<T> normed[NORM ? staged_size<T>(K) : 1];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto own = &ring[simd * uint(RING * DEPTH / 4)].v[0];
const auto staged = staged_vector<T>(&normed[0].v[0]);
const uint unit = (threadgroup_position_in_grid.x * uint(SIMDS) + simd) / uint(SPLIT);
const auto of_norm = tile_unit<SPLIT, DEPTH, RING, 0, ROWS>(matrix, staged, unit, own, lane, simd);
const auto of_input = tile_unit<SPLIT, DEPTH, RING, 0, ROWS>(matrix, input_vector<T>(x), unit, own, lane, simd);
if (NORM) {
  of_norm.start();
  stage_tiles<T, K, THREADS>(matrix, x, weight, staged.x, &group_sums[0], &partial[0], as_type<float>(EPS),
                             thread_position_in_threadgroup.x, lane, simd);
} else {
  of_input.start();
}
const uint row = unit * 16u + lane;
const bool mine = simd % uint(SPLIT) == 0u && lane < 16u && row < uint(ROWS);
const float before = ADD && mine ? float(residual[row]) : 0.0f;
const metal::float2 sums = NORM ? of_norm.products(&group_sums[0], &partial[0]) : of_input.products(&group_sums[0], &partial[0]);
if (mine) {
  const float sum = float(T(sums.x));
  out[row] = T(ADD ? sum + before : sum);
}
