// Q4_K for tiles.h; the layout is q4_k.h's.
template <int K, int GROUP>
FUNCTION constexpr int tile_count(Q4K) {
  return K / 256;
}

// A block: in each of two steps four lanes have 16 bytes of codes of each row.
struct Q4KTile {
  Words<4> heads[2];
  Words<4> codes[4];
};

template <int GROUP, int K, bool ALIGNED, typename W>
FUNCTION Q4KTile load_tile(Q4K, Rows<2> rows, uint block, uint lane, W w) {
  Q4KTile found;
  UNROLL
  for (int r = 0; r < 2; ++r) {
    const uint at = (rows.v[r] * uint(K / 256) + block) * 36u;
    found.heads[r] = load_words<4, ALIGNED>(w, at);
    found.codes[r * 2] = load_words<4, ALIGNED>(w, at + 4u + lane % 4u * 4u);
    found.codes[r * 2 + 1] = load_words<4, ALIGNED>(w, at + 20u + lane % 4u * 4u);
  }
  return found;
}

template <typename T, bool STAGED, int GROUP, int K, bool ALIGNED, typename X>
FUNCTION Pack<2> add_tile(Q4K, Q4KTile found, uint block, X x, uint lane, Pack<2> sums) {
  TileSums tile = no_sums();
  metal::simdgroup_barrier(metal::mem_flags::mem_none);  // the codes are asked for first, whatever the compiler prefers
  UNROLL
  for (int s = 0; s < 2; ++s) {
    const uint pair = uint(s) * 2u + lane % 4u / 2u;  // of groups
    const uint from = block * 256u + pair * 64u + lane % 2u * 16u;
    Words<2> xs[8];  // all asked for before the first is used
    UNROLL
    for (int i = 0; i < 8; ++i) {
      xs[i] = vector_part<2, T, STAGED, ALIGNED>(x, from + uint(i / 2 * 4 + i % 2 * 32), pair * 2u + uint(i % 2) == lane / 4u);
    }
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const uint a = found.codes[s].v[i];
      const uint b = found.codes[2 + s].v[i];
      UNROLL
      for (int high = 0; high < 2; ++high) {
        const Words<2> part = xs[i * 2 + high];
        tile = tile_added<T>(tile, two_codes<T>(a, high * 4), two_codes<T>(a, high * 4 + 8), two_codes<T>(b, high * 4),
                             two_codes<T>(b, high * 4 + 8), lower_halves(part.v[0], part.v[1]),
                             upper_halves(part.v[0], part.v[1]), lane);
      }
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const Q4KGroup values = q4_k_group(found.heads[i / 2], lane % 4u * 2u + uint(i % 2));
    sums.v[i / 2] = scaled_sum<T>(sums.v[i / 2], tile.dots.v[i], tile.totals.v[i], values.scale, -values.minimum);
  }
  return sums;
}
