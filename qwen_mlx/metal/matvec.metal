// out = T(W x) + residual for one vector x (K); FORMAT and MATRIX: the matrix (ROWS, K), see its format's header; residual and
// out (ROWS), T. With NORM x is normed first, with weight (K) and EPS, the bits of eps. A unit is R rows.
// Template: T, K, ROWS, R, SPLIT, DEPTH, RING, THREADS, GROUPS threadgroups, NORM, ADD, EPS, BITS, GROUP.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<uint> ring[RING == 0 ? 1 : THREADS / SIMD_WIDTH * RING * DEPTH / 4];
threadgroup float sixteens[NORM && needs_sums(FORMAT()) ? K / 16 : 1];
threadgroup Staged<T> normed[NORM ? (K * sizeof(T) + 127) / 128 * 9 : 1];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto own = &ring[RING == 0 ? 0u : simd * uint(RING * DEPTH / 4)].v[0];
uint unit = threadgroup_position_in_grid.x * uint(UNITS) + simd / uint(SPLIT);
const auto vector = &normed[0].v[0];
if (NORM) {
  start_unit<true, GROUP, K, R, 0, ROWS, SPLIT, DEPTH, RING>(FORMAT(), vector, unit, own, lane, simd, MATRIX);
  norm_row<T, K, THREADS>(FORMAT(), x, weight, vector, &sixteens[0], partial, float_of_bits(EPS), id, lane, simd);
} else {
  start_unit<false, GROUP, K, R, 0, ROWS, SPLIT, DEPTH, RING>(FORMAT(), x, unit, own, lane, simd, MATRIX);
}
static_assert(RING == 0 || GROUPS * UNITS * R >= ROWS, "what is started before the norm is the only round");
// As many rounds for each unit: unit_sums may have barriers.
for (int round = 0; round * GROUPS * UNITS * R < ROWS; ++round) {
  const uint row = unit * uint(R) + lane;
  const bool mine = simd % uint(SPLIT) == 0u && lane < uint(R) && row < uint(ROWS);
  const float before = ADD && mine ? float(residual[row]) : 0.0f;
  const UnitSums sums = NORM ? unit_sums<T, true, BITS, GROUP, K, R, 0, ROWS, SPLIT, DEPTH, RING>(
                                   FORMAT(), vector, &sixteens[0], unit, own, partial, lane, simd, MATRIX)
                             : unit_sums<T, false, BITS, GROUP, K, R, 0, ROWS, SPLIT, DEPTH, RING>(
                                   FORMAT(), x, &sixteens[0], unit, own, partial, lane, simd, MATRIX);
  if (mine) {
    const float sum = float(T(sums.first));
    out[row] = T(ADD ? sum + before : sum);
  }
  unit += uint(GROUPS * UNITS);
}
