// ../matvec_qkv.metal with tiles (tile_sums.h): a unit is 8 pairs, and every threadgroup has one round of units.
// Template: T, K, HEADS, KV, HALF, SLOTS, SPLIT, DEPTH, RING, THREADS, GROUPS, COPIERS, EPS, PAIRS1, and the packings'.
constexpr int PAIRS = (HEADS + 2 * KV) * HALF;
constexpr int SIMDS = THREADS / SIMD_WIDTH;
constexpr int UNITS1 = PAIRS1 / 8;
threadgroup float partial[SIMDS * 16];
threadgroup Staged<uint> ring[SIMDS * RING * DEPTH / 4];
threadgroup float group_sums[K / 16];
threadgroup Staged<T> normed[staged_size<T>(K)];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint slot = uint(position[0] - position[1]);
if (group >= uint(GROUPS)) {
  copy_recent_kv<T, KV, HALF, SLOTS>(recent_kv, new_recent_kv, slot, (group - uint(GROUPS)) * uint(THREADS) + id,
                                     uint(COPIERS * THREADS));
} else {
  const auto own = &ring[simd * uint(RING * DEPTH / 4)].v[0];
  const auto staged = staged_vector<T>(&normed[0].v[0]);
  const uint unit = (group * uint(SIMDS) + simd) / uint(SPLIT);
  const bool second = PAIRS1 < PAIRS && unit >= uint(UNITS1);
  constexpr int PAIRS2 = PAIRS1 < PAIRS ? PAIRS - PAIRS1 : 1;
  const auto tiles = tile_unit<SPLIT, DEPTH, RING, HALF, PAIRS1>(matrix, staged, unit, own, lane, simd);
  const auto tiles2 = tile_unit<SPLIT, DEPTH, RING, HALF, PAIRS2>(matrix2, staged, unit - uint(UNITS1), own, lane, simd);
  if (second) {
    tiles2.start();
  } else {
    tiles.start();
  }
  stage_tiles<T, K, THREADS>(matrix, x, weight, staged.x, &group_sums[0], &partial[0], as_type<float>(EPS), id, lane, simd);
  const uint pair = unit * 8u + lane;
  const bool mine = simd % uint(SPLIT) == 0u && lane < 8u && pair < uint(PAIRS);
  const HeadPair p = load_pair<HALF>(mine, pair, bias, table);  // before the products, which take as long
  const metal::float2 sums =
      second ? tiles2.products(&group_sums[0], &partial[0]) : tiles.products(&group_sums[0], &partial[0]);
  store_pair<T, HEADS, KV, HALF, SLOTS>(p, sums, q, new_recent_kv, slot);
}
