// out (HEADS, D) = T(the attention whose parts decode_attention_split.metal left in sums (HEADS, SPLITS, D) and stats (HEADS,
// SPLITS, 2)). A threadgroup computes a head; D divides its threads, each of which adds a share of the parts of an element.
// Template: T, D, SPLITS, THREADS.
constexpr uint SHARES = THREADS / D;
constexpr int AHEAD = 8;  // parts that a thread loads before it knows their factors
threadgroup float factors[SPLITS];
threadgroup float shares[THREADS];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint head = threadgroup_position_in_grid.y;
float ahead[AHEAD];
UNROLL
for (int n = 0; n < AHEAD; ++n) {
  const uint s = id / uint(D) + uint(n) * SHARES;
  ahead[n] = s < uint(SPLITS) ? sums[(head * uint(SPLITS) + s) * uint(D) + id % uint(D)] : 0.0f;
}
float largest = -INFINITY;
for (uint s = lane; s < uint(SPLITS); s += uint(SIMD_WIDTH)) {
  largest = metal::max(largest, stats[(head * uint(SPLITS) + s) * 2u]);
}
largest = metal::simd_max(largest);
float total = 0.0f;
for (uint s = lane; s < uint(SPLITS); s += uint(SIMD_WIDTH)) {
  const uint at = head * uint(SPLITS) + s;
  const float factor = metal::precise::exp(stats[2u * at] - largest);
  total = metal::fma(factor, stats[2u * at + 1u], total);
  if (simdgroup_index_in_threadgroup == 0u) {
    factors[s] = factor;
  }
}
total = metal::simd_sum(total);
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
float sum = 0.0f;
UNROLL
for (int n = 0; n < AHEAD; ++n) {
  const uint s = id / uint(D) + uint(n) * SHARES;
  sum = s < uint(SPLITS) ? metal::fma(factors[s], ahead[n], sum) : sum;
}
for (uint s = id / uint(D) + uint(AHEAD) * SHARES; s < uint(SPLITS); s += SHARES) {
  sum = metal::fma(factors[s], sums[(head * uint(SPLITS) + s) * uint(D) + id % uint(D)], sum);
}
shares[id] = sum;
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
if (id < uint(D)) {
  for (uint share = 1u; share < SHARES; ++share) {
    sum += shares[share * uint(D) + id];
  }
  out[head * uint(D) + id] = T(sum / total);
}
