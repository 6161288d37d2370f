// Q6_K for tiles.h; the layout is q6_k.h's. A stage is a block; each half of it has 64 bytes of low bits and 32 of high ones,
// for 8 groups of 16.
// After 512 words of low bits: 16 rows' 16 words of high bits, 4 of scales, and the word that the factor is in.
template <int GROUP, int K, int TOTAL, bool ALIGNED, typename Lines, typename Ring, typename W, typename H, typename S,
          typename F>
FUNCTION void start_codes(Q6K, Lines rows, uint stage, Ring ring, uint at, uint lane, W w, H high_bits, S scales, F factors) {
  constexpr uint FACTORS = uint(TOTAL) * uint(K / 256);
  start_pieces<K / 8, ALIGNED>(rows, stage * 32u, 8u, ring, at, lane, w);
  UNROLL
  for (uint i = 0u; i < 2u; ++i) {
    const uint row = i * 8u + lane / 4u;
    start_copy<4, ALIGNED>(ring, at + 512u + (row * 4u + lane % 4u) * 4u, high_bits,
                           rows.row(row) * uint(K / 16) + stage * 16u + lane % 4u * 4u);
  }
  const uint block = rows.row(lane % 16u) * uint(K / 256) + stage;
  if (lane < 16u) {
    start_copy<4, ALIGNED>(ring, at + 768u + lane * 4u, scales, block * 4u);
  } else if (FACTORS % 2u == 0u || block / 2u * 2u + 1u < FACTORS) {
    start_copy<2, ALIGNED>(ring, at + 832u + lane - 16u, factors, block / 2u * 2u);
  } else {
    put_element(ring, at + 832u + lane - 16u, 0u, factors, block);
  }
}

// Two codes of 6 bits: the lower 4 at `shift` in each half of `low`, the upper 2 at `shift` in those of `high`.
template <typename T>
FUNCTION uint two_codes6(uint low, uint high, int shift) {
  const uint top = shift >= 4 ? high >> uint(shift - 4) : high << 4;
  return masked_or(top, 0x00300030u, two_codes<T>(low, shift));
}

template <typename T, bool STAGED, int GROUP, int K, typename Lines, typename X, typename Sums, typename Ring, typename W,
          typename H, typename S, typename F>
FUNCTION Pack<2> add_stage(Q6K, Lines rows, uint stage, X x, Sums sixteens, Ring ring, uint at, uint vector_at, uint lane,
                           Pack<2> sums, W, H, S, F factors) {
  typedef decltype(value_of(factors[0])) Factor;
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  UNROLL
  for (uint h = 0u; h < 2u; ++h) {
    // Low and high halves of the codes have all columns' products; the low ones' groups are the first four columns.
    Pack<4> low = four_zeros();
    Pack<4> high = four_zeros();
    Pack<4> totals = four_zeros();
    const Words<4> first = load_words<4, true>(ring, at + piece_word(g, h * 4u + t));
    const Words<4> second = load_words<4, true>(ring, at + piece_word(g + 8u, h * 4u + t));
    const Words<4> first_top = load_words<4, true>(ring, at + 512u + (g * 4u + h * 2u + t % 2u) * 4u);
    const Words<4> second_top = load_words<4, true>(ring, at + 640u + (g * 4u + h * 2u + t % 2u) * 4u);
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint from = stage * 256u + h * 128u + g * 16u + uint(i * 4);
      const Words<4> xs = eight_pairs<T, STAGED>(Q6K(), x, ring, vector_at, from, g % 4u == t);
      UNROLL
      for (int k = 0; k < 2; ++k) {
        const uint a = first.v[i + k];
        const uint b = second.v[i + k];
        // Of the second two lanes the high bits begin two higher.
        const uint a_top = first_top.v[i + k] >> (t / 2u * 2u);
        const uint b_top = second_top.v[i + k] >> (t / 2u * 2u);
        Words<2> column;
        column.v[0] = xs.v[k * 2];
        column.v[1] = xs.v[k * 2 + 1];
        low = dots_added<T>(low, two_codes6<T>(a, a_top, 0), two_codes6<T>(a, a_top, 8), two_codes6<T>(b, b_top, 0),
                            two_codes6<T>(b, b_top, 8), column, lane);
        high = dots_added<T>(high, two_codes6<T>(a, a_top, 4), two_codes6<T>(a, a_top, 12), two_codes6<T>(b, b_top, 4),
                             two_codes6<T>(b, b_top, 12), column, lane);
        if (!STAGED) {
          totals = totals_added<T>(totals, column, lane);
        }
      }
    }
    if (STAGED) {
      totals.v[0] = totals.v[2] = sixteens[stage * 16u + h * 8u + t * 2u];
      totals.v[1] = totals.v[3] = sixteens[stage * 16u + h * 8u + t * 2u + 1u];
    }
    UNROLL
    for (uint r = 0u; r < 2u; ++r) {
      const uint block = rows.row(g + r * 8u) * uint(K / 256) + stage;
      const float factor = Number<Factor>::at(ring, at + 832u + g + r * 8u, block % 2u);
      const uint four = ring[at + 768u + (g + r * 8u) * 4u + h * 2u + t / 2u];
      UNROLL
      for (uint c = 0u; c < 2u; ++c) {
        const uint bits = four >> (t % 2u * 16u + c * 8u);
        const float scale = factor * float(int(bits << 24) >> 24);
        const float dot = t < 2u ? low.v[r * 2u + c] : high.v[r * 2u + c];
        sums.v[r] = scaled_sum<T>(sums.v[r], dot, totals.v[r * 2u + c], scale, -32.0f * scale);
      }
    }
  }
  return sums;
}
