// x W^T for few rows of x, arranged (packed_rows.h), and packed W (N, K): parts (a part for each PER stages of 256 elements, 8 TILES,
// N), which add_parts.metal adds if they are several and float. A simdgroup has a unit of 16 rows of W.
// Template: T, K, N, GROUP, TILES of 8 rows of x, PER, RING words of a unit's stage, THREADS, and the packing's.
constexpr int SIMDS = THREADS / SIMD_WIDTH;
typedef decltype(value_of(parts[0])) Part;
threadgroup Staged<uint> memory[SIMDS * 2 * RING / 4];
threadgroup Staged<uint> halves_of_x[HalfStage<GROUP, TILES>::WORDS / 2];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint unit = threadgroup_position_in_grid.x * uint(SIMDS) + simd;
const uint begin = threadgroup_position_in_grid.y * uint(PER);
const uint end = begin + uint(PER) < uint(K / 256) ? begin + uint(PER) : uint(K / 256);
const auto ring = &memory[simd * uint(2 * RING / 4)].v[0];
const auto x = &halves_of_x[0].v[0];
const auto rows = arranged_rows<GROUP, TILES>(x, lane);
RowTiles<TILES> sums = no_tiles<TILES>();
start_unit<N>(matrix, unit, begin, end, ring, 0u, lane);
start_half<GROUP, TILES, THREADS>(arranged, begin * 2u, end * 2u, x, id);
uint now = 0u;  // where the stage lies; the next one comes beside it
for (uint stage = begin; stage < end; ++stage) {
  wait_for_batches<0>();
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  start_half<GROUP, TILES, THREADS>(arranged, stage * 2u + 1u, end * 2u, x, id);
  start_unit<N>(matrix, unit, stage + 1u, end, ring, uint(RING) - now, lane);
  sums = added_rows<TILES, N>(matrix, rows, unit, stage, 0u, ring, now, lane, sums);
  wait_for_batches<1>();  // the next stage's codes may still be under way
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  start_half<GROUP, TILES, THREADS>(arranged, stage * 2u + 2u, end * 2u, x, id);
  sums = added_rows<TILES, N>(matrix, rows, unit, stage, 1u, ring, now, lane, sums);
  now = uint(RING) - now;
}
UNROLL
for (int tile = 0; tile < TILES; ++tile) {
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint row = uint(tile * 8 + i % 2) + lane % 4u * 2u;
    const uint column = unit * 16u + lane / 4u + uint(i / 2 * 8);
    if (column < uint(N)) {
      parts[(threadgroup_position_in_grid.y * uint(TILES * 8) + row) * uint(N) + column] = Part(sums.tiles[tile].v[i]);
    }
  }
}
