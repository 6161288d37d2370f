// Q6_K for tiles.h; the layout is q6_k.h's.
template <int K, int GROUP>
FUNCTION constexpr int tile_count(Q6K) {
  return K / 128;
}

// Half a block: four lanes have 16 bytes of low bits and the high bits that belong to them, of each row.
template <typename Factor>
struct Q6KTile {
  Words<4> low[2];
  Words<4> high[2];
  uint scales[2];
  Factor factors[2];
};

template <int GROUP, int K, bool ALIGNED, typename W, typename H, typename S, typename F>
FUNCTION auto load_tile(Q6K, Rows<2> rows, uint block, uint lane, W w, H high_bits, S scales, F factors)
    -> Q6KTile<decltype(value_of(factors[0]))> {
  Q6KTile<decltype(value_of(factors[0]))> found;
  UNROLL
  for (int r = 0; r < 2; ++r) {
    const uint half_block = rows.v[r] * uint(K / 128) + block;
    found.low[r] = load_words<4, ALIGNED>(w, half_block * 16u + lane % 4u * 4u);
    found.high[r] = load_words<4, ALIGNED>(high_bits, half_block * 8u + lane % 2u * 4u);
    found.scales[r] = scales[half_block * 2u + lane % 4u / 2u];
    found.factors[r] = factors[half_block / 2u];
  }
  return found;
}

// Two codes of 6 bits: the lower 4 at `shift` in each half of `low`, the upper 2 at `shift` in those of `high`.
template <typename T>
FUNCTION uint two_codes6(uint low, uint high, int shift) {
  const uint top = shift >= 4 ? high >> uint(shift - 4) : high << 4;
  return masked_or(top, 0x00300030u, two_codes<T>(low, shift));
}

template <typename T, bool STAGED, int GROUP, int K, bool ALIGNED, typename Factor, typename X>
FUNCTION Pack<2> add_tile(Q6K, Q6KTile<Factor> found, uint block, X x, uint lane, Pack<2> sums) {
  const uint t = lane % 4u;
  TileSums tile = no_sums();
  metal::simdgroup_barrier(metal::mem_flags::mem_none);  // the codes are asked for first, whatever the compiler prefers
  Words<2> xs[8];  // all asked for before the first is used
  UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint from = block * 128u + t * 16u + uint(i / 2 * 4 + i % 2 * 64);
    xs[i] = vector_part<2, T, STAGED, ALIGNED>(x, from, t + uint(i % 2 * 4) == lane / 4u);
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint a = found.low[0].v[i];
    const uint b = found.low[1].v[i];
    // Of the second two lanes the high bits begin two higher.
    const uint a_high = found.high[0].v[i] >> (t / 2u * 2u);
    const uint b_high = found.high[1].v[i] >> (t / 2u * 2u);
    UNROLL
    for (int high = 0; high < 2; ++high) {
      const Words<2> part = xs[i * 2 + high];
      tile = tile_added<T>(tile, two_codes6<T>(a, a_high, high * 4), two_codes6<T>(a, a_high, high * 4 + 8),
                           two_codes6<T>(b, b_high, high * 4), two_codes6<T>(b, b_high, high * 4 + 8),
                           lower_halves(part.v[0], part.v[1]), upper_halves(part.v[0], part.v[1]), lane);
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint bits = found.scales[i / 2] >> (t % 2u * 16u + uint(i % 2 * 8));
    const float scale = float(found.factors[i / 2]) * float(int(bits << 24) >> 24);
    sums.v[i / 2] = scaled_sum<T>(sums.v[i / 2], tile.dots.v[i], tile.totals.v[i], scale, -32.0f * scale);
  }
  return sums;
}
