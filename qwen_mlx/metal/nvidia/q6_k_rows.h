// Q6_K for packed_rows.h.

// Adds half a stage's products of a unit with TILES tiles of x's rows. Of a group's 16 elements a lane has 4.
template <int TILES, int N, typename T, int K, int ROWS, typename W, typename H, typename S, typename F, typename X, typename Ring>
FUNCTION RowTiles<TILES> added_rows(Q6KTiles<T, K, ROWS, W, H, S, F> matrix, X x, uint unit, uint stage, uint half_stage, Ring ring,
                                    uint at, uint lane, RowTiles<TILES> sums) {
  typedef decltype(value_of(matrix.factors[0])) Factor;
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  UNROLL
  for (uint second = 0u; second < 2u; ++second) {  // of each 32 elements the first 16, then the others
    UNROLL
    for (uint quarter = 0u; quarter < 4u; ++quarter) {
      const uint group = quarter * 2u + second;
      metal::uint2 columns[TILES];
      metal::float2 totals[TILES];
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        columns[tile] = x.four(half_stage, group, tile);
        totals[tile] = x.sums(half_stage, group, tile);
      }
      Scales scales;
      uint codes[2];
      UNROLL
      for (int r = 0; r < 2; ++r) {
        const uint row = g + uint(r * 8);
        const uint block = row_of<16, 0, N>(unit, row) * uint(K / 256) + stage;
        const float factor = element_of(ring, at + 832u + row, block % 2u, Factor());
        const uint four = ring[at + 768u + row * 4u + half_stage * 2u + quarter / 2u] >> (second * 8u);
        const metal::float2 pair = halves((four ^ 0x00800080u) & 0x00ff00ffu);  // an int8 with 128 added, over 2^24
        scales.scale[r] = factor * metal::fma(quarter % 2u == 0u ? pair.x : pair.y, 16777216.0f, -128.0f);
        scales.offset[r] = -32.0f * scales.scale[r];
        const uint low = ring[at + piece_word(row, half_stage * 4u + quarter % 2u * 2u + second) + t];
        const uint high = ring[at + 512u + row * 16u + half_stage * 8u + second * 4u + t];
        codes[r] = masked_or(low >> (quarter / 2u * 4u), 0x0f0f0f0fu, ((high >> (quarter * 2u)) & 0x03030303u) << 4);
      }
      const metal::uint4 rows = metal::uint4(two_bytes<T>(codes[0]), two_bytes<T>(codes[1]), two_bytes<T>(codes[0] >> 8),
                                             two_bytes<T>(codes[1] >> 8));
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        const Pack<4> dots = tile_product(zeros<4>(), rows, columns[tile], lane, T());
        sums.tiles[tile] = scaled_tile<T>(sums.tiles[tile], dots, totals[tile], scales);
      }
    }
  }
  return sums;
}
