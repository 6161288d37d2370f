// Attention of one token on a long cache, a part of it. A threadgroup computes GROUP of the RATIO query heads that share a
// key/value head for one of SPLITS parts, which combine.metal joins. Inputs and template are decode_attention.metal's, and SPLITS
// and GROUP.
// sums (B, KV RATIO, SPLITS, D) float: weighted values; stats (B, KV RATIO, SPLITS, 2) float: the largest score and the sum of
// weights.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
threadgroup float parts[SIMDS * D];
threadgroup float largest[SIMDS];
threadgroup float totals[SIMDS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint query = threadgroup_position_in_grid.y * uint(GROUP);
const uint head = query / uint(RATIO);
const uint batch = head / uint(KV);
const uint first_token = RAGGED ? uint(first[batch]) : 0u;
const auto a = attend<T, KV, GROUP, D, WINDOW, DEPTH>(
    q, query, kv, uint(kv_shape[2]), recent_kv, uint(recent_kv_shape[2]), uint(position[0]), uint(position[1]),
    first_token, batch * uint(KV) + head, split * uint(SIMDS) + simd, uint(SPLITS * SIMDS), lane, as_type<float>(SCALE));
UNROLL
for (int g = 0; g < GROUP; ++g) {
  const Merged all = merged<D, SIMDS>(a, g, &parts[0], &largest[0], &totals[0], id, lane, simd);
  const uint at = (query + uint(g)) * uint(SPLITS) + split;
  if (id < uint(D)) {
    sums[at * uint(D) + id] = all.sum;
  }
  if (id == 0u) {
    stats[2u * at] = all.largest;
    stats[2u * at + 1u] = all.total;
  }
}
