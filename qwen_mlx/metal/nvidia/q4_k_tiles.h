// Q4_K for tiles.h; q4_k.h describes it. A stage is a block: 128 bytes of codes, of which each 32 are two groups, in the low and
// in the high halves.
template <typename T, int K, typename W>
struct Q4KTiles {
  typedef ByteOrder Order;
  enum { COLUMNS = K, STAGES = K / 256, WIDTH = K / 256 * 36 };
  W w;

  // After 512 words of codes: each row's head of its block.
  template <typename StageRows, typename Ring>
  FUNCTION void start_codes(StageRows rows, uint stage, Ring ring, uint at, uint lane) const {
    start_pieces<WIDTH>(rows, stage * 36u + 4u, 8u, ring, at, lane, w);
    if (lane < 16u) {
      start_copy<4>(ring, at + 512u + lane * 4u, w, rows.row(lane) * uint(WIDTH) + stage * 36u);
    }
  }

  template <typename StageRows, typename X, typename Sums, typename Ring>
  FUNCTION Pack<2> add_stage(StageRows, uint stage, X x, Sums group_sums, Ring ring, uint at, uint vector_at, uint lane,
                             Pack<2> sums) const {
    const uint g = lane / 4u;
    const uint t = lane % 4u;
    const uint from = stage * 256u + g * 32u + t % 2u * 16u;  // the lane's elements of its column's group
    // Each half of the codes has all columns' products; only those of its own groups, every second column, are used.
    Pack<4> low = zeros<4>();
    Pack<4> high = zeros<4>();
    Pack<4> totals = zeros<4>();
    UNROLL
    for (uint s = 0u; s < 2u; ++s) {
      const bool mine = g / 2u == s * 2u + t / 2u;
      const metal::uint4 first = four_words(ring, at + piece_word(g, s * 4u + t));
      const metal::uint4 second = four_words(ring, at + piece_word(g + 8u, s * 4u + t));
      UNROLL
      for (int i = 0; i < 4; i += 2) {
        const metal::uint4 xs = eight_pairs<ByteOrder>(x, ring, vector_at, from + uint(i * 4), mine);
        UNROLL
        for (int k = 0; k < 2; ++k) {
          const metal::uint2 column = metal::uint2(xs[k * 2], xs[k * 2 + 1]);
          low = code_dots<T>(low, first[i + k], second[i + k], 0, 8, column, lane);
          high = code_dots<T>(high, first[i + k], second[i + k], 4, 12, column, lane);
          if (!X::STAGED) {
            totals = totals_added<T>(totals, column, lane);
          }
        }
      }
    }
    if (X::STAGED) {
      const uint at_group = stage * 16u + t * 4u;
      totals.v[0] = totals.v[2] = group_sums[at_group] + group_sums[at_group + 1u];
      totals.v[1] = totals.v[3] = group_sums[at_group + 2u] + group_sums[at_group + 3u];
    }
    UNROLL
    for (int r = 0; r < 2; ++r) {
      const metal::uint4 head = four_words(ring, at + 512u + (g + uint(r) * 8u) * 4u);
      const Q4KGroup even = q4_k_group(head, t * 2u);
      const Q4KGroup odd = q4_k_group(head, t * 2u + 1u);
      sums.v[r] = scaled_sum<T>(sums.v[r], low.v[r * 2], totals.v[r * 2], even.scale, -even.minimum);
      sums.v[r] = scaled_sum<T>(sums.v[r], high.v[r * 2 + 1], totals.v[r * 2 + 1], odd.scale, -odd.minimum);
    }
    return sums;
  }
};

template <typename T, int K, typename W>
FUNCTION Q4KTiles<T, K, W> q4_k_tiles(W w) {
  return {w};
}
