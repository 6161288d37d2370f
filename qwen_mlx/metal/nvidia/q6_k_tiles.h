// Q6_K for tiles.h; q6_k.h describes it. A stage is a block; each half of it has 64 bytes of low bits and 32 of high ones, for 8
// groups of 16.

// Two codes of 6 bits: the lower 4 at `shift` in each half of `low`, the upper 2 at `shift` in those of `high`.
template <typename T>
FUNCTION uint two_codes6(uint low, uint high, int shift) {
  const uint top = shift >= 4 ? high >> uint(shift - 4) : high << 4;
  return masked_or(top, 0x00300030u, two_codes<T>(low, shift));
}

template <typename T, int K, int ROWS, typename W, typename H, typename S, typename F>
struct Q6KTiles {
  typedef ByteOrder Order;
  enum { COLUMNS = K, STAGES = K / 256, FACTORS = ROWS * (K / 256) };
  W w;
  H high;
  S scales;
  F factors;

  // After 512 words of low bits: 16 rows' 16 words of high bits, 4 of scales, and the word that the factor is in.
  template <typename StageRows, typename Ring>
  FUNCTION void start_codes(StageRows rows, uint stage, Ring ring, uint at, uint lane) const {
    start_pieces<K / 8>(rows, stage * 32u, 8u, ring, at, lane, w);
    UNROLL
    for (uint i = 0u; i < 2u; ++i) {
      const uint row = i * 8u + lane / 4u;
      start_copy<4>(ring, at + 512u + (row * 4u + lane % 4u) * 4u, high,
                    rows.row(row) * uint(K / 16) + stage * 16u + lane % 4u * 4u);
    }
    const uint block = rows.row(lane % 16u) * uint(K / 256) + stage;
    if (lane < 16u) {
      start_copy<4>(ring, at + 768u + lane * 4u, scales, block * 4u);
    } else if (FACTORS % 2 == 0 || block / 2u * 2u + 1u < uint(FACTORS)) {
      start_copy<2>(ring, at + 832u + lane - 16u, factors, block / 2u * 2u);
    } else {
      put_element(ring, at + 832u + lane - 16u, 0u, factors, block);
    }
  }

  template <typename StageRows, typename X, typename Sums, typename Ring>
  FUNCTION Pack<2> add_stage(StageRows rows, uint stage, X x, Sums group_sums, Ring ring, uint at, uint vector_at, uint lane,
                             Pack<2> sums) const {
    typedef decltype(value_of(factors[0])) Factor;
    const uint g = lane / 4u;
    const uint t = lane % 4u;
    UNROLL
    for (uint h = 0u; h < 2u; ++h) {
      // Low and high halves of the codes have all columns' products; the low ones' groups are the first four columns.
      Pack<4> low_dots = zeros<4>();
      Pack<4> high_dots = zeros<4>();
      Pack<4> totals = zeros<4>();
      const metal::uint4 first = four_words(ring, at + piece_word(g, h * 4u + t));
      const metal::uint4 second = four_words(ring, at + piece_word(g + 8u, h * 4u + t));
      const metal::uint4 first_top = four_words(ring, at + 512u + (g * 4u + h * 2u + t % 2u) * 4u);
      const metal::uint4 second_top = four_words(ring, at + 640u + (g * 4u + h * 2u + t % 2u) * 4u);
      UNROLL
      for (int i = 0; i < 4; i += 2) {
        const uint from = stage * 256u + h * 128u + g * 16u + uint(i * 4);
        const metal::uint4 xs = eight_pairs<ByteOrder>(x, ring, vector_at, from, g % 4u == t);
        UNROLL
        for (int k = 0; k < 2; ++k) {
          const uint a = first[i + k];
          const uint b = second[i + k];
          // In the second two lanes the high bits begin two higher.
          const uint a_top = first_top[i + k] >> (t / 2u * 2u);
          const uint b_top = second_top[i + k] >> (t / 2u * 2u);
          const metal::uint2 column = metal::uint2(xs[k * 2], xs[k * 2 + 1]);
          low_dots = dots_added<T>(low_dots, two_codes6<T>(a, a_top, 0), two_codes6<T>(a, a_top, 8), two_codes6<T>(b, b_top, 0),
                              two_codes6<T>(b, b_top, 8), column, lane);
          high_dots = dots_added<T>(high_dots, two_codes6<T>(a, a_top, 4), two_codes6<T>(a, a_top, 12), two_codes6<T>(b, b_top, 4),
                               two_codes6<T>(b, b_top, 12), column, lane);
          if (!X::STAGED) {
            totals = totals_added<T>(totals, column, lane);
          }
        }
      }
      if (X::STAGED) {
        totals.v[0] = totals.v[2] = group_sums[stage * 16u + h * 8u + t * 2u];
        totals.v[1] = totals.v[3] = group_sums[stage * 16u + h * 8u + t * 2u + 1u];
      }
      UNROLL
      for (uint r = 0u; r < 2u; ++r) {
        const uint block = rows.row(g + r * 8u) * uint(K / 256) + stage;
        const float factor = element_of(ring, at + 832u + g + r * 8u, block % 2u, Factor());
        const uint four = ring[at + 768u + (g + r * 8u) * 4u + h * 2u + t / 2u];
        UNROLL
        for (uint c = 0u; c < 2u; ++c) {
          const float scale = factor * low_int8(four >> (t % 2u * 16u + c * 8u));
          const float dot = t < 2u ? low_dots.v[r * 2u + c] : high_dots.v[r * 2u + c];
          sums.v[r] = scaled_sum<T>(sums.v[r], dot, totals.v[r * 2u + c], scale, -32.0f * scale);
        }
      }
    }
    return sums;
  }
};

template <typename T, int K, int ROWS, typename W, typename H, typename S, typename F>
FUNCTION Q6KTiles<T, K, ROWS, W, H, S, F> q6_k_tiles(W w, H high, S scales, F factors) {
  return {w, high, scales, factors};
}
