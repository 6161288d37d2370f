// out (rows, K) = T(elements of the matrix that `matrix` reads, see rows.h). A thread takes 8 neighbours.
// Grid: (K / 8, rows). Template: T, K, R = 1, and the packing's.

const uint column = thread_position_in_grid.x * 8u;
const uint row = thread_position_in_grid.y;
if (column < uint(K)) {
  store<T>(out, row * uint(K) + column, matrix.eight_elements(row, column));
}
