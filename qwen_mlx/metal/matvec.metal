// out = T(W x) + residual for one vector x (K); MATRIX: the matrix (ROWS, K), see its format's header; residual and
// out (ROWS), T. With NORM x is normed first, with weight (K) and EPS, the bits of eps. A unit is R rows.
// Template: T, K, ROWS, R, SPLIT, DEPTH, THREADS, NORM, ADD, EPS, BITS, GROUP.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[NORM ? K * sizeof(T) / 16 : 1];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint first_unit = threadgroup_position_in_grid.x * uint(UNITS);
const uint unit = first_unit + simd / uint(SPLIT);
if (NORM) {
  norm_row<T, K, THREADS>(x, weight, &normed[0].v[0], partial, float_of_bits(EPS), id, lane, simd);
}
if (unit * uint(R) < uint(ROWS)) {
  const Rows<R> rows = rows_of<R, 0, ROWS>(unit);
  if (NORM) {
    partial_sums<T, BITS, GROUP, K, R, SPLIT, DEPTH>(&normed[0].v[0], rows, partial, lane, simd, MATRIX);
  } else {
    partial_sums<T, BITS, GROUP, K, R, SPLIT, DEPTH>(x, rows, partial, lane, simd, MATRIX);
  }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
const uint row = first_unit * uint(R) + id;
if (id < uint(UNITS * R) && row < uint(ROWS)) {
  const float sum = whole_sum<R, SPLIT>(partial, id / uint(R), id % uint(R));
  out[row] = ADD ? T(float(T(sum)) + float(residual[row])) : T(sum);
}
