// token (rows) int32: the index of the largest logit of each row, of equal ones the first; -1 if one is not finite. keys and
// indices (rows, PARTS) are best_parts.metal's. A simdgroup computes a row. Template: PARTS.
const uint lane = thread_index_in_simdgroup;
const uint row = threadgroup_position_in_grid.y;
Best best;
best.key = 0u;
best.index = 0xffffffffu;
for (uint part = lane; part < uint(PARTS); part += uint(SIMD_WIDTH)) {
  Best other;
  other.key = keys[row * uint(PARTS) + part];
  other.index = indices[row * uint(PARTS) + part];
  best = better(best, other);
}
best = best_of_simdgroup(best);
if (lane == 0u) {
  token[row] = best.key == not_finite() ? -1 : int(best.index);
}
