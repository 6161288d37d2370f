// Q4_K for tiles.h; the layout is q4_k.h's. A stage is a block: 128 bytes of codes, of which each 32 are two groups, in the low
// and in the high halves.
// After 512 words of codes: the first four words of each row's block.
template <int GROUP, int K, int TOTAL, bool ALIGNED, typename Lines, typename Ring, typename W>
FUNCTION void start_codes(Q4K, Lines rows, uint stage, Ring ring, uint at, uint lane, W w) {
  constexpr int WIDTH = K / 256 * 36;
  start_pieces<WIDTH, ALIGNED>(rows, stage * 36u + 4u, 8u, ring, at, lane, w);
  if (lane < 16u) {
    start_copy<4, ALIGNED>(ring, at + 512u + lane * 4u, w, rows.row(lane) * uint(WIDTH) + stage * 36u);
  }
}

template <typename T, bool STAGED, int GROUP, int K, typename Lines, typename X, typename Sums, typename Ring, typename W>
FUNCTION Pack<2> add_stage(Q4K, Lines, uint stage, X x, Sums sixteens, Ring ring, uint at, uint vector_at, uint lane,
                           Pack<2> sums, W) {
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  const uint from = stage * 256u + g * 32u + t % 2u * 16u;  // the lane's elements of its column's group
  // Each half of the codes has all columns' products; only those of its own groups, every second column, are used.
  Pack<4> low = four_zeros();
  Pack<4> high = four_zeros();
  Pack<4> totals = four_zeros();
  UNROLL
  for (uint s = 0u; s < 2u; ++s) {
    const bool mine = g / 2u == s * 2u + t / 2u;
    const Words<4> first = load_words<4, true>(ring, at + piece_word(g, s * 4u + t));
    const Words<4> second = load_words<4, true>(ring, at + piece_word(g + 8u, s * 4u + t));
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      const Words<4> xs = eight_pairs<T, STAGED>(Q4K(), x, ring, vector_at, from + uint(i * 4), mine);
      UNROLL
      for (int k = 0; k < 2; ++k) {
        const uint a = first.v[i + k];
        const uint b = second.v[i + k];
        Words<2> column;
        column.v[0] = xs.v[k * 2];
        column.v[1] = xs.v[k * 2 + 1];
        low = dots_added<T>(low, two_codes<T>(a, 0), two_codes<T>(a, 8), two_codes<T>(b, 0), two_codes<T>(b, 8), column, lane);
        high = dots_added<T>(high, two_codes<T>(a, 4), two_codes<T>(a, 12), two_codes<T>(b, 4), two_codes<T>(b, 12), column,
                             lane);
        if (!STAGED) {
          totals = totals_added<T>(totals, column, lane);
        }
      }
    }
  }
  if (STAGED) {
    const uint at_group = stage * 16u + t * 4u;
    totals.v[0] = totals.v[2] = sixteens[at_group] + sixteens[at_group + 1u];
    totals.v[1] = totals.v[3] = sixteens[at_group + 2u] + sixteens[at_group + 3u];
  }
  UNROLL
  for (int r = 0; r < 2; ++r) {
    const Words<4> head = load_words<4, true>(ring, at + 512u + (g + uint(r) * 8u) * 4u);
    const Q4KGroup even = q4_k_group(head, t * 2u);
    const Q4KGroup odd = q4_k_group(head, t * 2u + 1u);
    sums.v[r] = scaled_sum<T>(sums.v[r], low.v[r * 2], totals.v[r * 2], even.scale, -even.minimum);
    sums.v[r] = scaled_sum<T>(sums.v[r], high.v[r * 2 + 1], totals.v[r * 2 + 1], odd.scale, -odd.minimum);
  }
  return sums;
}
