// out = T(T(silu(g)) u) with g | u = T(W norm(x)) for one vector x (K); FORMAT, MATRIX: the matrix (2 F, K), gate first, see its
// format's header; weight (K) and EPS, the bits of eps, of the norm; out (F), T. A unit is R / 2 columns.
// Template: T, K, F, R, SPLIT, DEPTH, RING, THREADS, GROUPS threadgroups, EPS, BITS, GROUP.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<uint> ring[RING == 0 ? 1 : THREADS / SIMD_WIDTH * RING * DEPTH / 4];
threadgroup float sixteens[needs_sums(FORMAT()) ? K / 16 : 1];
threadgroup Staged<T> normed[(K * sizeof(T) + 127) / 128 * 9];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto own = &ring[RING == 0 ? 0u : simd * uint(RING * DEPTH / 4)].v[0];
const auto vector = &normed[0].v[0];
uint unit = threadgroup_position_in_grid.x * uint(UNITS) + simd / uint(SPLIT);
start_unit<true, GROUP, K, R, F, F, SPLIT, DEPTH, RING>(FORMAT(), vector, unit, own, lane, simd, MATRIX);
norm_row<T, K, THREADS>(FORMAT(), x, weight, vector, &sixteens[0], partial, float_of_bits(EPS), id, lane, simd);
static_assert(RING == 0 || GROUPS * UNITS * (R / 2) >= F, "what is started before the norm is the only round");
// As many rounds for each unit: unit_sums may have barriers.
for (int round = 0; round * GROUPS * UNITS * (R / 2) < F; ++round) {
  const UnitSums sums = unit_sums<T, true, BITS, GROUP, K, R, F, F, SPLIT, DEPTH, RING>(
      FORMAT(), vector, &sixteens[0], unit, own, partial, lane, simd, MATRIX);
  const uint column = unit * uint(R / 2) + lane;
  if (simd % uint(SPLIT) == 0u && lane < uint(R / 2) && column < uint(F)) {
    const float gate = float(T(sums.first));
    const float up = float(T(sums.second));
    const float activated = sizeof(T) == 4 ? silu(gate) : gate / (1.0f + metal::precise::exp(-gate));
    out[column] = T(float(T(activated)) * up);
  }
  unit += uint(GROUPS * UNITS);
}
