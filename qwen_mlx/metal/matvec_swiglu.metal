// out = T(T(silu(g)) u) with g | u = T(W norm(x)) for one vector x (K); MATRIX: the matrix (2 F, K), gate first, see its
// format's header; weight (K) and EPS, the bits of eps, of the norm; out (F), T. A unit is R / 2 columns.
// Template: T, K, F, R, SPLIT, DEPTH, THREADS, EPS, BITS, GROUP.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[K * sizeof(T) / 16];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint first_unit = threadgroup_position_in_grid.x * uint(UNITS);
const uint unit = first_unit + simd / uint(SPLIT);
norm_row<T, K, THREADS>(x, weight, &normed[0].v[0], partial, float_of_bits(EPS), id, lane, simd);
if (unit * uint(R / 2) < uint(F)) {
  partial_sums<T, BITS, GROUP, K, R, SPLIT, DEPTH>(&normed[0].v[0], rows_of<R, F, F>(unit), partial, lane, simd, MATRIX);
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
const uint column = first_unit * uint(R / 2) + id;
if (id < uint(UNITS * R / 2) && column < uint(F)) {
  const uint owner = id / uint(R / 2);
  const uint r = id % uint(R / 2);
  const float gate = float(T(whole_sum<R, SPLIT>(partial, owner, r)));
  const float up = float(T(whole_sum<R, SPLIT>(partial, owner, r + uint(R / 2))));
  const float activated = sizeof(T) == 4 ? silu(gate) : gate / (1.0f + metal::precise::exp(-gate));
  out[column] = T(float(T(activated)) * up);
}
