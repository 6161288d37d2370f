// q | k | v = T(T(W norm(x)) + bias) for one vector x (K), q and k rotated. `matrix` reads the rows of the first PAIRS1 pairs of
// W ((HEADS + 2 KV) 2 HALF, K), `matrix2` those after them, see rows.h; weight (K) and EPS, the bits of eps, are the norm's;
// table (HALF, 2) float is cosine and sine; position (2) int32: the token's, and how many tokens lie before recent_kv.
// q (HEADS, 2 HALF); recent_kv and new_recent_kv (2 KV, SLOTS, 2 HALF), which gets k and v in slot position[0] - position[1];
// all T. A unit is R / 2 pairs of elements HALF apart.
// Template: T, K, HEADS, KV, HALF, SLOTS, R, SPLIT (1 where there are two matrices: a threadgroup's units may belong to both),
// DEPTH, THREADS, the last COPIERS threadgroups, which copy recent_kv while the others multiply, EPS, PAIRS1, and the packings'.
constexpr int PAIRS = (HEADS + 2 * KV) * HALF;
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
constexpr int UNITS1 = PAIRS1 / (R / 2);
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[staged_size<T>(K)];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint groups = threadgroups_per_grid.x - uint(COPIERS);  // that multiply
const uint slot = uint(position[0] - position[1]);
if (group >= groups) {
  copy_recent_kv<T, KV, HALF, SLOTS>(recent_kv, new_recent_kv, slot, (group - groups) * uint(THREADS) + id,
                                     uint(COPIERS * THREADS));
} else {
  const auto staged = staged_vector<T>(&normed[0].v[0]);
  uint unit = group * uint(UNITS) + simd / uint(SPLIT);
  stage_norm<T, K, THREADS>(x, weight, staged.x, &partial[0], as_type<float>(EPS), id, lane, simd);
  const uint stride = groups * uint(UNITS);
  // Every unit takes as many rounds: unit_products may contain barriers.
  for (uint first = 0u; first * uint(R / 2) < uint(PAIRS); first += stride) {
    const uint pair = unit * uint(R / 2) + lane;
    const bool mine = simd % uint(SPLIT) == 0u && lane < uint(R / 2) && pair < uint(PAIRS);
    const HeadPair p = load_pair<HALF>(mine, pair, bias, table);  // before the products, which take as long
    metal::float2 sums;
    if (PAIRS1 < PAIRS && unit >= uint(UNITS1)) {
      const Rows<R> rows = rows_of<R, HALF, PAIRS1 < PAIRS ? PAIRS - PAIRS1 : 1>(unit - uint(UNITS1));
      sums = unit_products<SPLIT, DEPTH>(matrix2, staged, rows, &partial[0], lane, simd);
    } else {
      sums = unit_products<SPLIT, DEPTH>(matrix, staged, rows_of<R, HALF, PAIRS1>(unit), &partial[0], lane, simd);
    }
    store_pair<T, HEADS, KV, HALF, SLOTS>(p, sums, q, new_recent_kv, slot);
    unit += stride;
  }
}
