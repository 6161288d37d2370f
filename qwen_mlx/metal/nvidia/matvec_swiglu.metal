// ../matvec_swiglu.metal with tiles (tile_sums.h): a unit is 8 columns of gate and up, and every threadgroup has one round.
// Template: T, K, F, SPLIT, DEPTH, RING, THREADS, EPS, and the packing's.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float partial[SIMDS * 16];
threadgroup Staged<uint> ring[SIMDS * RING * DEPTH / 4];
threadgroup float group_sums[K / 16];
threadgroup Staged<T> normed[staged_size<T>(K)];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto own = &ring[simd * uint(RING * DEPTH / 4)].v[0];
const auto staged = staged_vector<T>(&normed[0].v[0]);
const uint unit = (threadgroup_position_in_grid.x * uint(SIMDS) + simd) / uint(SPLIT);
const auto tiles = tile_unit<SPLIT, DEPTH, RING, F, F>(matrix, staged, unit, own, lane, simd);
tiles.start();
stage_tiles<T, K, THREADS>(matrix, x, weight, staged.x, &group_sums[0], &partial[0], as_type<float>(EPS),
                           thread_position_in_threadgroup.x, lane, simd);
const metal::float2 sums = tiles.products(&group_sums[0], &partial[0]);
const uint column = unit * 8u + lane;
if (simd % uint(SPLIT) == 0u && lane < 8u && column < uint(F)) {
  out[column] = T(swiglu<T>(float(T(sums.x)), float(T(sums.y))));
}
