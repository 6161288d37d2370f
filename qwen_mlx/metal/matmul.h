// Products of a few rows of x with 16 rows of w, as the tiles of 16 by 16 by 8 that tile_product multiplies.

// For rows g and g + 8 of w and, in each tile of 8 rows of x, rows 2 t and 2 t + 1 of it.
template <int TILES>
struct RowTiles {
  Pack<4> tiles[TILES];
};

// Rows `low` and `high` of w with COUNT rows of x: part `part` of SPLIT parts of the K elements, DEPTH steps at a time. In a
// step of 32 elements a lane has 8 neighbouring ones of each row: which of them an instruction takes for which column of its
// tile is the same for w and x, so that the sum does not change.
template <typename T, int K, int COUNT, int TILES, int SPLIT, int DEPTH, bool ALIGNED, typename X, typename W>
FUNCTION RowTiles<TILES> row_tiles(X x, W w, uint low, uint high, uint part, uint lane) {
  RowTiles<TILES> sums;
  UNROLL
  for (int tile = 0; tile < TILES; ++tile) {
    UNROLL
    for (int i = 0; i < 4; ++i) {
      sums.tiles[tile].v[i] = 0.0f;
    }
  }
  for (uint start = part * uint(DEPTH); start < uint(K / 32); start += uint(SPLIT * DEPTH)) {
    Words<4> first[DEPTH];
    Words<4> second[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint step = start + uint(d) < uint(K / 32) ? start + uint(d) : start;
      const uint i = step * 32u + lane % 4u * 8u;
      first[d] = load_halves<4, ALIGNED>(w, low * uint(K) + i);
      second[d] = load_halves<4, ALIGNED>(w, high * uint(K) + i);
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      if (start + uint(d) < uint(K / 32)) {
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
          uint row = uint(tile * 8) + lane / 4u;
          row = row < uint(COUNT) ? row : uint(COUNT - 1);
          const Words<4> xs = load_halves<4, ALIGNED>(x, row * uint(K) + (start + uint(d)) * 32u + lane % 4u * 8u);
          UNROLL
          for (int half_step = 0; half_step < 2; ++half_step) {
            Words<4> rows;
            rows.v[0] = first[d].v[half_step * 2];
            rows.v[1] = second[d].v[half_step * 2];
            rows.v[2] = first[d].v[half_step * 2 + 1];
            rows.v[3] = second[d].v[half_step * 2 + 1];
            Words<2> columns;
            columns.v[0] = xs.v[half_step * 2];
            columns.v[1] = xs.v[half_step * 2 + 1];
            sums.tiles[tile] = tile_product<T>(sums.tiles[tile], rows, columns, lane);
          }
        }
      }
    }
  }
  return sums;
}
