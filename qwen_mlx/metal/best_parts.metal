// The largest number of each of PARTS parts of every row of logits (rows, COUNT), T. keys and indices (rows, PARTS), uint, are
// best.h's. A threadgroup computes a part. Template: T, COUNT, PARTS, THREADS.
constexpr uint EACH = uint((COUNT + PARTS - 1) / PARTS);
threadgroup uint keys_of[THREADS / SIMD_WIDTH];
threadgroup uint indices_of[THREADS / SIMD_WIDTH];

const uint id = thread_position_in_threadgroup.x;
const uint part = threadgroup_position_in_grid.x;
const uint row = threadgroup_position_in_grid.y;
const uint most = (part + 1u) * EACH;
const uint end = most < uint(COUNT) ? most : uint(COUNT);
Best best;
best.key = 0u;
best.index = uint(COUNT);
for (uint i = part * EACH + id; i < end; i += uint(THREADS)) {
  best = better(best, best_of(float(logits[row * uint(COUNT) + i]), i));
}
best = best_of_simdgroup(best);
if (thread_index_in_simdgroup == 0u) {
  keys_of[simdgroup_index_in_threadgroup] = best.key;
  indices_of[simdgroup_index_in_threadgroup] = best.index;
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
if (id == 0u) {
  for (int s = 1; s < THREADS / SIMD_WIDTH; ++s) {
    Best other;
    other.key = keys_of[s];
    other.index = indices_of[s];
    best = better(best, other);
  }
  keys[row * uint(PARTS) + part] = best.key;
  indices[row * uint(PARTS) + part] = best.index;
}
