// sums = T(x + residual), out = weight * T(sums / sqrt(mean(sums^2) + eps)): one threadgroup a row, kept in registers.
// x, residual, sums, out (rows, D), weight (D), all T; MLX allocates sums and out, so that they are aligned.
// Template: T, D, N elements a pack, which divides D, THREADS a row, EPS the bits of eps.
threadgroup float partial[THREADS / SIMD_WIDTH];

const uint first = thread_position_in_threadgroup.x * uint(N);
const uint row = threadgroup_position_in_grid.x * uint(D);
add_norm<T, D, N, THREADS>(x, residual, weight, sums, out, &partial[0], float_of_bits(EPS), row, first,
                           thread_index_in_simdgroup, simdgroup_index_in_threadgroup);
