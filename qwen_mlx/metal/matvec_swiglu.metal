// out = T(T(silu(g)) u) with g | u = T(W norm(x)) for one vector x (K). `matrix` reads W (2 F, K), gate's rows first, see rows.h;
// weight (K) and EPS, the bits of eps, are the norm's; out (F), T. A unit is R / 2 columns of gate and up.
// Template: T, K, F, R, SPLIT, DEPTH, THREADS, EPS, and the packing's.
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[staged_size<T>(K)];

const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const auto staged = staged_vector<T>(&normed[0].v[0]);
uint unit = threadgroup_position_in_grid.x * uint(UNITS) + simd / uint(SPLIT);
stage_norm<T, K, THREADS>(x, weight, staged.x, &partial[0], as_type<float>(EPS), thread_position_in_threadgroup.x, lane, simd);
const uint stride = threadgroups_per_grid.x * uint(UNITS);
// Every unit takes as many rounds: unit_products may contain barriers.
for (uint first = 0u; first * uint(R / 2) < uint(F); first += stride) {
  const Rows<R> rows = rows_of<R, F, F>(unit);
  const metal::float2 sums = unit_products<SPLIT, DEPTH>(matrix, staged, rows, &partial[0], lane, simd);
  const uint column = unit * uint(R / 2) + lane;
  if (simd % uint(SPLIT) == 0u && lane < uint(R / 2) && column < uint(F)) {
    out[column] = T(swiglu<T>(float(T(sums.x)), float(T(sums.y))));
  }
  unit += stride;
}
