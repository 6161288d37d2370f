// out (rows, K) = T(elements of the matrix's rows `ids`, or of all with IDS false); w, w2, w3, w4: the matrix, see its format's
// header. A thread takes 8 neighbours. Grid: (K / 8, rows). Template: T, K, IDS.
const uint column = thread_position_in_grid.x * 8u;
const uint row = thread_position_in_grid.y;
if (column < uint(K)) {
  const uint from = IDS ? uint(ids[row]) : row;
  store<T>(out, row * uint(K) + column, eight_elements<K>(w, w2, w3, w4, from, column));
}
