// MLX's affine packing with 4 bits for tiles.h; affine.h describes it. A word is 8 codes; its first and fifth become a pair.
struct AffineOrder {
  static FUNCTION constexpr int staged_element(int k) {
    return k % 2 * 4 + k / 2;
  }

  static FUNCTION metal::uint4 paired(metal::uint4 w) {
    return metal::uint4(lower_halves(w.x, w.z), upper_halves(w.x, w.z), lower_halves(w.y, w.w), upper_halves(w.y, w.w));
  }
};

template <typename T, int K, int GROUP, typename W, typename S, typename B>
struct AffineTiles {
  typedef AffineOrder Order;
  enum { COLUMNS = K, STAGES = (K + 255) / 256, PAIRS = 128 / GROUP };  // PAIRS of groups in a stage's row
  W w;
  S scales;
  B biases;

  // Copies two scales of a row, or biases. Beyond the row's end the vector is 0, so that any scale will do.
  template <typename Ring, typename Array>
  FUNCTION void start_pair(Ring ring, uint at, Array array, uint row, uint group) const {
    constexpr uint GROUPS = uint(K / GROUP);
    if (GROUPS % 2u == 0u) {
      start_copy<2>(ring, at, array, row * GROUPS + (group < GROUPS ? group : 0u));
    } else {
      UNROLL
      for (uint c = 0u; c < 2u; ++c) {
        put_element(ring, at, c, array, row * GROUPS + (group + c < GROUPS ? group + c : 0u));
      }
    }
  }

  // After 512 words of codes: scales, then biases, (16, 256 / GROUP) each.
  template <typename StageRows, typename Ring>
  FUNCTION void start_codes(StageRows rows, uint stage, Ring ring, uint at, uint lane) const {
    constexpr uint PAIR = uint(sizeof(scales[0]) / 2);  // words
    start_pieces<K / 8>(rows, stage * 32u, uint(K / 32) - stage * 8u, ring, at, lane, w);
    UNROLL
    for (uint i = 0u; i < uint(PAIRS) * 16u; i += 16u) {
      const uint n = i + lane % 16u;
      const uint row = rows.row(n / uint(PAIRS));
      const uint group = (stage * uint(PAIRS) + n % uint(PAIRS)) * 2u;
      const uint to = at + 512u + n * PAIR;
      if (lane < 16u) {
        start_pair(ring, to, scales, row, group);
      } else {
        start_pair(ring, to + uint(PAIRS) * 16u * PAIR, biases, row, group);
      }
    }
  }

  template <typename StageRows, typename X, typename Sums, typename Ring>
  FUNCTION Pack<2> add_stage(StageRows, uint stage, X x, Sums group_sums, Ring ring, uint at, uint vector_at, uint lane,
                             Pack<2> sums) const {
    typedef decltype(value_of(scales[0])) Scale;
    constexpr uint PAIR = uint(sizeof(scales[0]) / 2);
    const uint g = lane / 4u;
    const uint t = lane % 4u;
    Pack<4> dots = zeros<4>();
    Pack<4> totals = zeros<4>();
    UNROLL
    for (uint s = 0u; s < 2u; ++s) {
      const uint from = stage * 256u + s * 128u + t * 32u;
      const bool mine = from < uint(K) && from % 256u / uint(GROUP) == g;
      const metal::uint4 first = four_words(ring, at + piece_word(g, s * 4u + t));
      const metal::uint4 second = four_words(ring, at + piece_word(g + 8u, s * 4u + t));
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const metal::uint4 xs = eight_pairs<AffineOrder>(x, ring, vector_at, from + uint(i * 8), mine);
        UNROLL
        for (int h = 0; h < 2; ++h) {
          const metal::uint2 column = metal::uint2(xs[h * 2], xs[h * 2 + 1]);
          dots = code_dots<T>(dots, first[i], second[i], h * 8, h * 8 + 4, column, lane);
          if (!X::STAGED) {
            totals = totals_added<T>(totals, column, lane);
          }
        }
      }
    }
    if (X::STAGED) {
      UNROLL
      for (uint c = 0u; c < 2u; ++c) {
        const uint from = stage * 16u + (t * 2u + c) * uint(GROUP / 16);
        const bool there = t < uint(PAIRS) && from * 16u < uint(K);
        UNROLL
        for (uint k = 0u; k < uint(GROUP / 16); ++k) {
          totals.v[c] += there ? group_sums[from + k] : 0.0f;
        }
        totals.v[c + 2u] = totals.v[c];
      }
    }
    UNROLL
    for (uint r = 0u; r < 2u; ++r) {
      UNROLL
      for (uint c = 0u; c < 2u; ++c) {  // of the columns without a group both sums are 0
        const uint from = at + 512u + ((g + r * 8u) * uint(PAIRS) + t % uint(PAIRS)) * PAIR;
        const float scale = element_of(ring, from, c, Scale());
        const float bias = element_of(ring, from + uint(PAIRS) * 16u * PAIR, c, Scale());
        sums.v[r] = scaled_sum<T>(sums.v[r], dots.v[r * 2u + c], totals.v[r * 2u + c], scale, bias);
      }
    }
    return sums;
  }
};

template <typename T, int K, int GROUP, typename W, typename S, typename B>
FUNCTION AffineTiles<T, K, GROUP, W, S, B> affine_tiles(W w, S scales, B biases) {
  return {w, scales, biases};
}
