// Q4_K for packed_rows.h.

// Adds half a stage's products of a unit with TILES tiles of x's rows. A chunk's 64 elements are two groups; a lane has 8 bytes of
// its codes in each row.
template <int TILES, int N, typename T, int K, typename W, typename X, typename Ring>
FUNCTION RowTiles<TILES> added_rows(Q4KTiles<T, K, W>, X x, uint, uint, uint half_stage, Ring ring, uint at, uint lane,
                                    RowTiles<TILES> sums) {
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  UNROLL
  for (uint part = 0u; part < 2u; ++part) {
    const uint chunk = half_stage * 2u + part;
    UNROLL
    for (int h = 0; h < 2; ++h) {
      metal::uint4 columns[TILES];
      metal::float2 totals[TILES];
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        columns[tile] = x.eight(half_stage, part * 2u + uint(h), tile);
        totals[tile] = x.sums(half_stage, part * 2u + uint(h), tile);
      }
      Scales scales;
      metal::uint2 codes[2];
      UNROLL
      for (int r = 0; r < 2; ++r) {
        const uint row = g + uint(r * 8);
        codes[r] = two_words(ring, at + piece_word(row, chunk * 2u + t / 2u) + t % 2u * 2u);
        const Q4KFactors factors = q4_k_factors(four_words(ring, at + 512u + row * 4u), chunk);
        scales.scale[r] = h == 0 ? factors.scales.x : factors.scales.y;
        scales.offset[r] = h == 0 ? factors.offsets.x : factors.offsets.y;
      }
      metal::uint4 rows[2];
      UNROLL
      for (int k = 0; k < 2; ++k) {
        rows[k] = metal::uint4(two_codes<T>(codes[0][k], h * 4), two_codes<T>(codes[1][k], h * 4),
                               two_codes<T>(codes[0][k], h * 4 + 8), two_codes<T>(codes[1][k], h * 4 + 8));
      }
      UNROLL
      for (int tile = 0; tile < TILES; ++tile) {
        const metal::uint4 xs = columns[tile];
        Pack<4> dots = tile_product(zeros<4>(), rows[0], metal::uint2(xs.x, xs.y), lane, T());
        dots = tile_product(dots, rows[1], metal::uint2(xs.z, xs.w), lane, T());
        sums.tiles[tile] = scaled_tile<T>(sums.tiles[tile], dots, totals[tile], scales);
      }
    }
  }
  return sums;
}
