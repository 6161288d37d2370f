// Attention of one token on the cache, a part of it: a threadgroup for GROUP query heads and one of
// SPLITS parts. q (KV RATIO, D), kv (1, 2 KV, room, D) and tail (1, 2 KV, its room, D),
// keys first, T; place (2) int32: the token's position, and how many tokens lie before the tail. For combine.metal:
// sums (KV RATIO, SPLITS, D) and stats (KV RATIO, SPLITS, 2), float: weighted values, the largest score, the sum of weights.
// Template: T, KV, RATIO query heads of each, GROUP, D, SPLITS, THREADS, WINDOW keys that are seen or 0 for all, SCALE the
// bits of the scores' factor.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
constexpr int PER = D / SIMD_WIDTH;
threadgroup float queries[GROUP * D];
threadgroup float parts[SIMDS * D];
threadgroup float largest[SIMDS];
threadgroup float totals[SIMDS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint split = threadgroup_position_in_grid.x;
const uint first = threadgroup_position_in_grid.y * uint(GROUP);  // query head
for (uint i = id; i < uint(GROUP * D); i += uint(THREADS)) {
  queries[i] = float(q[first * uint(D) + i]);
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
const Attended<GROUP, PER> a = attend_all<T, KV, GROUP, D, WINDOW>(
    queries, kv, uint(kv_shape[2]), tail, uint(tail_shape[2]), uint(place[0]), uint(place[1]),
    first / uint(RATIO), split * uint(SIMDS) + simd, uint(SPLITS * SIMDS), lane, float_of_bits(SCALE));

for (int g = 0; g < GROUP; ++g) {
  store<float>(parts, simd * uint(D) + lane * uint(PER), a.sum[g]);
  const float all = metal::simd_sum(a.total[g]);
  if (lane == 0u) {
    largest[simd] = a.largest[g];
    totals[simd] = all;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (id < uint(D)) {
    float most = largest[0];
    for (int s = 1; s < SIMDS; ++s) {
      most = metal::max(most, largest[s]);
    }
    float total = 0.0f;
    float sum = 0.0f;
    for (int s = 0; s < SIMDS; ++s) {
      // Who had no keys has -inf, which minus -inf would be NaN.
      const float factor = totals[s] == 0.0f ? 0.0f : metal::precise::exp(largest[s] - most);
      total = metal::fma(factor, totals[s], total);
      sum = metal::fma(factor, parts[uint(s) * uint(D) + id], sum);
    }
    const uint at = (first + uint(g)) * uint(SPLITS) + split;
    sums[at * uint(D) + id] = sum;
    if (id == 0u) {
      stats[2u * at] = most;
      stats[2u * at + 1u] = total;
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}
