// out (rows, K) = T(elements of rows `ids` of the matrix MATRIX, see its format's header). A thread takes 8 neighbours.
// Grid: (K / 8, rows). Template: T, K, BITS, GROUP.
const uint column = thread_position_in_grid.x * 8u;
const uint row = thread_position_in_grid.y;
if (column < uint(K)) {
  store<T>(out, row * uint(K) + column, eight_elements<K, BITS, GROUP>(uint(ids[row]), column, MATRIX));
}
