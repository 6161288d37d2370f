// MLX's affine packing with 4 bits for tiles.h; the layout is affine.h's.
template <int K, int GROUP>
FUNCTION constexpr int tile_count(Affine) {
  return (K + 8 * GROUP - 1) / (8 * GROUP);
}

// 8 groups: in each of GROUP / 16 steps four lanes have 32 codes of each row.
template <int GROUP, typename Scale>
struct AffineTile {
  Words<4> codes[2 * (GROUP / 16)];
  Scale scales[4];
  Scale biases[4];
};

template <int GROUP, int K, bool ALIGNED, typename W, typename S, typename B>
FUNCTION auto load_tile(Affine, Rows<2> rows, uint block, uint lane, W w, S scales, B biases)
    -> AffineTile<GROUP, decltype(value_of(scales[0]))> {
  AffineTile<GROUP, decltype(value_of(scales[0]))> found;
  UNROLL
  for (int r = 0; r < 2; ++r) {
    UNROLL
    for (int s = 0; s < GROUP / 16; ++s) {
      // Beyond the row's end the vector is 0, whatever the codes.
      uint chunk = (block * uint(GROUP / 16) + uint(s)) * 4u + lane % 4u;
      chunk = chunk < uint(K / 32) ? chunk : 0u;
      found.codes[r * (GROUP / 16) + s] = load_words<4, ALIGNED>(w, (rows.v[r] * uint(K / 32) + chunk) * 4u);
    }
    UNROLL
    for (int c = 0; c < 2; ++c) {
      uint group = block * 8u + lane % 4u * 2u + uint(c);
      group = rows.v[r] * uint(K / GROUP) + (group < uint(K / GROUP) ? group : 0u);
      found.scales[r * 2 + c] = scales[group];
      found.biases[r * 2 + c] = biases[group];
    }
  }
  return found;
}

template <typename T, bool STAGED, int GROUP, int K, bool ALIGNED, typename Scale, typename X>
FUNCTION Pack<2> add_tile(Affine, AffineTile<GROUP, Scale> found, uint block, X x, uint lane, Pack<2> sums) {
  constexpr int STEPS = GROUP / 16;
  TileSums tile = no_sums();
  if (!STAGED) {  // the codes are asked for first, whatever the compiler prefers
    metal::simdgroup_barrier(metal::mem_flags::mem_none);
  }
  UNROLL
  for (int s = 0; s < STEPS; ++s) {
    const uint from = ((block * uint(STEPS) + uint(s)) * 4u + lane % 4u) * 32u;
    const bool mine = from < uint(K) && from / uint(GROUP) % 8u == lane / 4u;
    Words<4> xs[4];
    if (!STAGED) {  // far away: all are asked for before the first is used
      UNROLL
      for (int i = 0; i < 4; ++i) {
        xs[i] = vector_part<4, T, STAGED, ALIGNED>(x, from + uint(i * 8), mine);
      }
    }
    UNROLL
    for (int i = 0; i < 4; ++i) {
      if (STAGED) {
        xs[i] = vector_part<4, T, STAGED, ALIGNED>(x, from + uint(i * 8), mine);
      }
      const uint a = found.codes[s].v[i];
      const uint b = found.codes[STEPS + s].v[i];
      tile = tile_added<T>(tile, two_codes<T>(a, 0), two_codes<T>(a, 4), two_codes<T>(b, 0), two_codes<T>(b, 4),
                           lower_halves(xs[i].v[0], xs[i].v[2]), upper_halves(xs[i].v[0], xs[i].v[2]), lane);
      tile = tile_added<T>(tile, two_codes<T>(a, 8), two_codes<T>(a, 12), two_codes<T>(b, 8), two_codes<T>(b, 12),
                           lower_halves(xs[i].v[1], xs[i].v[3]), upper_halves(xs[i].v[1], xs[i].v[3]), lane);
    }
  }
  UNROLL
  for (int i = 0; i < 4; ++i) {
    sums.v[i / 2] =
        scaled_sum<T>(sums.v[i / 2], tile.dots.v[i], tile.totals.v[i], float(found.scales[i]), float(found.biases[i]));
  }
  return sums;
}
