// out (COUNT, N) = T(x W^T) for a few rows of x (COUNT, K) and W (N, K), all T of 16 bits; K is a multiple of 32. A unit, 16 rows
// of W, belongs to SPLIT simdgroups, each of which multiplies a part of K.
// Template: T, K, N, TILES of 8 rows of x, SPLIT, DEPTH steps that a lane loads at once, THREADS.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
constexpr int SUMS = 16 * 8 * TILES;
threadgroup float partial[UNITS * SPLIT * SUMS];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint first = threadgroup_position_in_grid.x * uint(UNITS);
const uint unit = first + simd / uint(SPLIT);
const uint low = row_of<16, 0, N>(unit, lane / 4u);
const uint high = row_of<16, 0, N>(unit, lane / 4u + 8u);
const uint count = uint(x_shape[0]);
const RowTiles<TILES> sums = row_tiles<T, K, TILES, SPLIT, DEPTH>(x, count, w, low, high, simd % uint(SPLIT), lane);
UNROLL
for (int tile = 0; tile < TILES; ++tile) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint row = uint(tile * 8 + i % 2) + lane % 4u * 2u;
    partial[simd * uint(SUMS) + row * 16u + lane / 4u + uint(i / 2 * 8)] = sums.tiles[tile].v[i];
  }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
for (uint i = thread_position_in_threadgroup.x; i < uint(UNITS) * count * 16u; i += uint(THREADS)) {
  const uint at = i % (count * 16u);
  const uint column = (first + i / (count * 16u)) * 16u + at % 16u;
  if (column < uint(N)) {
    float sum = 0.0f;
    for (int s = 0; s < SPLIT; ++s) {
      sum += partial[(i / (count * 16u) * uint(SPLIT) + uint(s)) * uint(SUMS) + at];
    }
    out[at / 16u * uint(N) + column] = T(sum);
  }
}
