// out (HEADS, D) = T(the attention whose parts decode_attention_split.metal left in sums (HEADS, SPLITS, D) and stats (HEADS,
// SPLITS, 2)). A threadgroup computes a head, a thread an element. Template: T, D, SPLITS.
const uint element = thread_position_in_threadgroup.x;
const uint head = threadgroup_position_in_grid.y;
float largest = stats[head * uint(2 * SPLITS)];
for (uint s = 1u; s < uint(SPLITS); ++s) {
  largest = metal::max(largest, stats[(head * uint(SPLITS) + s) * 2u]);
}
float total = 0.0f;
float sum = 0.0f;
for (uint s = 0u; s < uint(SPLITS); ++s) {
  const uint at = head * uint(SPLITS) + s;
  const float factor = metal::precise::exp(stats[2u * at] - largest);
  total = metal::fma(factor, stats[2u * at + 1u], total);
  sum = metal::fma(factor, sums[at * uint(D) + element], sum);
}
out[head * uint(D) + element] = T(sum / total);
