// out = T(W x) + residual for one vector x (K). `matrix` reads W (ROWS, K), see rows.h; residual (where ADD) and out (ROWS), T.
// With NORM x is normed first, with weight (K) and EPS, the bits of eps. A unit is R rows.
// Template: T, K, ROWS, R, SPLIT, DEPTH, THREADS, NORM, ADD, EPS, and the packing's.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[NORM ? staged_size<T>(K) : 1];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto staged = staged_vector<T>(&normed[0].v[0]);
uint unit = threadgroup_position_in_grid.x * uint(UNITS) + simd / uint(SPLIT);
if (NORM) {
  stage_norm<T, K, THREADS>(x, weight, staged.x, &partial[0], as_type<float>(EPS), thread_position_in_threadgroup.x, lane, simd);
}
const uint stride = threadgroups_per_grid.x * uint(UNITS);
// Every unit takes as many rounds: unit_products may contain barriers.
for (uint first = 0u; first * uint(R) < uint(ROWS); first += stride) {
  const Rows<R> rows = rows_of<R, 0, ROWS>(unit);
  const uint row = unit * uint(R) + lane;
  const bool mine = simd % uint(SPLIT) == 0u && lane < uint(R) && row < uint(ROWS);
  const float before = ADD && mine ? float(residual[row]) : 0.0f;
  const metal::float2 sums = NORM ? unit_products<SPLIT, DEPTH>(matrix, staged, rows, &partial[0], lane, simd)
                                  : unit_products<SPLIT, DEPTH>(matrix, input_vector<T>(x), rows, &partial[0], lane, simd);
  if (mine) {
    const float sum = float(T(sums.x));
    out[row] = T(ADD ? sum + before : sum);
  }
  unit += stride;
}
