// Products of a few rows of x with 16 rows of w, as the tiles of 16 by 16 by 8 that tile_product multiplies.

// The sums for rows g and g + 8 of w and, in each tile of 8 rows of x, rows 2 t and 2 t + 1 of it.
template <int TILES>
struct RowTiles {
  Pack<4> tiles[TILES];
};

template <int TILES>
FUNCTION RowTiles<TILES> no_tiles() {
  RowTiles<TILES> sums;
  UNROLL
  for (int tile = 0; tile < TILES; ++tile) {
    sums.tiles[tile] = zeros<4>();
  }
  return sums;
}

// Rows `low` and `high` of w times `count` rows of x: part `part` of SPLIT parts of the K elements, DEPTH steps at a time. In a step
// of 32 elements a lane has 8 neighbouring ones of each row. Which of them an instruction takes for which column of its tile is
// the same for w and x, so that the sum does not change.
template <typename T, int K, int TILES, int SPLIT, int DEPTH, typename X, typename W>
FUNCTION RowTiles<TILES> row_tiles(X x, uint count, W w, uint low, uint high, uint part, uint lane) {
  RowTiles<TILES> sums = no_tiles<TILES>();
  for (uint start = part * uint(DEPTH); start < uint(K / 32); start += uint(SPLIT * DEPTH)) {
    metal::uint4 first[DEPTH];
    metal::uint4 second[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint step = start + uint(d) < uint(K / 32) ? start + uint(d) : start;
      const uint i = step * 32u + lane % 4u * 8u;
      first[d] = load_halves(w, low * uint(K) + i);
      second[d] = load_halves(w, high * uint(K) + i);
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      if (start + uint(d) < uint(K / 32)) {
        UNROLL
        for (int tile = 0; tile < TILES; ++tile) {
          uint row = uint(tile * 8) + lane / 4u;
          row = row < count ? row : count - 1u;
          const metal::uint4 xs = load_halves(x, row * uint(K) + (start + uint(d)) * 32u + lane % 4u * 8u);
          UNROLL
          for (int h = 0; h < 2; ++h) {
            const metal::uint4 rows =
                metal::uint4(first[d][h * 2], second[d][h * 2], first[d][h * 2 + 1], second[d][h * 2 + 1]);
            sums.tiles[tile] = tile_product(sums.tiles[tile], rows, metal::uint2(xs[h * 2], xs[h * 2 + 1]), lane, T());
          }
        }
      }
    }
  }
  return sums;
}
