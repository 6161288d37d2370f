// out (count, N) = T(the sum of SPLITS parts), parts being (SPLITS, ROWS, N) float with ROWS at least count. A thread adds an
// element's. Template: T, N, ROWS, SPLITS.

const uint column = thread_position_in_grid.x;
const uint row = threadgroup_position_in_grid.y;
if (column < uint(N)) {
  float sum = 0.0f;
  UNROLL
  for (int s = 0; s < SPLITS; ++s) {
    sum += parts[(uint(s * ROWS) + row) * uint(N) + column];
  }
  out[row * uint(N) + column] = T(sum);
}
