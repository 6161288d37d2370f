// MLX's affine packing with 4 bits for tiles.h; the layout is affine.h's. A word is 8 codes; its first and fifth become a pair.
FUNCTION constexpr int staged_element(Tiles<Affine>, int k) {
  return k % 2 * 4 + k / 2;
}

FUNCTION Words<4> paired(Affine, Words<4> words) {
  Words<4> pairs;
  UNROLL
  for (int i = 0; i < 2; ++i) {
    pairs.v[i * 2] = lower_halves(words.v[i], words.v[i + 2]);
    pairs.v[i * 2 + 1] = upper_halves(words.v[i], words.v[i + 2]);
  }
  return pairs;
}

// Copies a stage's scales of each row, or biases, two at a time, PAIRS lanes a row.
template <int GROUP, int K, bool ALIGNED, typename Ring, typename S>
FUNCTION void start_pair(Ring ring, uint at, S scales, uint row, uint group) {
  constexpr uint GROUPS = uint(K / GROUP);
  if (GROUPS % 2u == 0u) {  // beyond the row's end the vector is 0: any scale will do
    start_copy<2, ALIGNED>(ring, at, scales, row * GROUPS + (group < GROUPS ? group : 0u));
  } else {
    UNROLL
    for (uint c = 0u; c < 2u; ++c) {
      put_element(ring, at, c, scales, row * GROUPS + (group + c < GROUPS ? group + c : 0u));
    }
  }
}

// After 512 words of codes: scales, then biases, (16, 256 / GROUP) each.
template <int GROUP, int K, int TOTAL, bool ALIGNED, typename Lines, typename Ring, typename W, typename S, typename B>
FUNCTION void start_codes(Affine, Lines rows, uint stage, Ring ring, uint at, uint lane, W w, S scales, B biases) {
  constexpr uint PAIR = uint(sizeof(scales[0]) / 2);
  constexpr uint PAIRS = uint(128 / GROUP);
  start_pieces<K / 8, ALIGNED>(rows, stage * 32u, uint(K / 32) - stage * 8u, ring, at, lane, w);
  UNROLL
  for (uint i = 0u; i < PAIRS * 16u; i += 16u) {
    const uint n = i + lane % 16u;
    const uint row = rows.row(n / PAIRS);
    const uint group = (stage * PAIRS + n % PAIRS) * 2u;
    const uint to = at + 512u + n * PAIR;
    if (lane < 16u) {
      start_pair<GROUP, K, ALIGNED>(ring, to, scales, row, group);
    } else {
      start_pair<GROUP, K, ALIGNED>(ring, to + PAIRS * 16u * PAIR, biases, row, group);
    }
  }
}

template <typename T, bool STAGED, int GROUP, int K, typename Lines, typename X, typename Sums, typename Ring, typename W,
          typename S, typename B>
FUNCTION Pack<2> add_stage(Affine, Lines, uint stage, X x, Sums sixteens, Ring ring, uint at, uint vector_at, uint lane,
                           Pack<2> sums, W, S scales, B) {
  typedef decltype(value_of(scales[0])) Scale;
  constexpr uint PAIR = uint(sizeof(scales[0]) / 2);
  constexpr uint PAIRS = uint(128 / GROUP);
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  Pack<4> dots = four_zeros();
  Pack<4> totals = four_zeros();
  UNROLL
  for (uint s = 0u; s < 2u; ++s) {
    const uint from = stage * 256u + s * 128u + t * 32u;
    const bool mine = from < uint(K) && from % 256u / uint(GROUP) == g;
    const Words<4> first = load_words<4, true>(ring, at + piece_word(g, s * 4u + t));
    const Words<4> second = load_words<4, true>(ring, at + piece_word(g + 8u, s * 4u + t));
    UNROLL
    for (int i = 0; i < 4; ++i) {
      const Words<4> xs = eight_pairs<T, STAGED>(Affine(), x, ring, vector_at, from + uint(i * 8), mine);
      const uint a = first.v[i];
      const uint b = second.v[i];
      UNROLL
      for (int half_i = 0; half_i < 2; ++half_i) {
        Words<2> column;
        column.v[0] = xs.v[half_i * 2];
        column.v[1] = xs.v[half_i * 2 + 1];
        dots = dots_added<T>(dots, two_codes<T>(a, half_i * 8), two_codes<T>(a, half_i * 8 + 4), two_codes<T>(b, half_i * 8),
                             two_codes<T>(b, half_i * 8 + 4), column, lane);
        if (!STAGED) {
          totals = totals_added<T>(totals, column, lane);
        }
      }
    }
  }
  if (STAGED) {
    UNROLL
    for (uint c = 0u; c < 2u; ++c) {
      const uint from = stage * 16u + (t * 2u + c) * uint(GROUP / 16);
      const bool there = t < PAIRS && from * 16u < uint(K);
      UNROLL
      for (uint k = 0u; k < uint(GROUP / 16); ++k) {
        totals.v[c] += there ? sixteens[from + k] : 0.0f;
      }
      totals.v[c + 2u] = totals.v[c];
    }
  }
  UNROLL
  for (uint r = 0u; r < 2u; ++r) {
    UNROLL
    for (uint c = 0u; c < 2u; ++c) {  // of the columns without a group both sums are 0
      const uint from = at + 512u + ((g + r * 8u) * PAIRS + t % PAIRS) * PAIR;
      const float scale = Number<Scale>::at(ring, from, c);
      const float bias = Number<Scale>::at(ring, from + PAIRS * 16u * PAIR, c);
      sums.v[r] = scaled_sum<T>(sums.v[r], dots.v[r * 2u + c], totals.v[r * 2u + c], scale, bias);
    }
  }
  return sums;
}
