// q | k | v = T(T(W norm(x)) + bias) for one vector x (K), q and k turned. FORMAT, MATRIX: W ((HEADS + 2 KV) 2 HALF, K), see its
// format's header, of which a second matrix may hold what follows the first PAIRS1 pairs; weight (K) and EPS, the bits of
// eps, of the norm; table (HALF, 2), cosine and sine; place (2) int32: the position, and how many tokens lie before the
// tail. q (HEADS, 2 HALF), T. new_tail (2 KV, TAIL, 2 HALF), T: tail, k and v put at place[0] - place[1]. A unit is R / 2
// pairs of elements HALF apart.
// Template: T, K, HEADS, KV, HALF, TAIL, R, SPLIT, DEPTH, RING, THREADS, GROUPS threadgroups that multiply and COPIERS that
// copy the tail meanwhile, EPS, BITS, GROUP, PAIRS1; where there is a second matrix BITS2, GROUP2, and SPLIT is 1: a
// threadgroup's units may belong to both.
constexpr int PAIRS = (HEADS + 2 * KV) * HALF;
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<uint> ring[RING == 0 ? 1 : THREADS / SIMD_WIDTH * RING * DEPTH / 4];
threadgroup float sixteens[needs_sums(FORMAT()) ? K / 16 : 1];
threadgroup Staged<T> normed[(K * sizeof(T) + 127) / 128 * 9];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
const uint group = threadgroup_position_in_grid.x;
const uint slot = uint(place[0] - place[1]);
if (group >= uint(GROUPS)) {
  constexpr int N = 2 * HALF * sizeof(T) % 16 == 0 ? 16 / sizeof(T) : 1;
  for (uint i = ((group - uint(GROUPS)) * uint(THREADS) + id) * uint(N); i < uint(4 * KV * TAIL * HALF);
       i += uint(COPIERS * THREADS * N)) {
    if (i / uint(2 * HALF) % uint(TAIL) != slot) {
      store<T>(new_tail, i, load<N>(tail, i));
    }
  }
} else {
  uint unit = group * uint(UNITS) + simd / uint(SPLIT);
  const auto own = &ring[RING == 0 ? 0u : simd * uint(RING * DEPTH / 4)].v[0];
  const auto vector = &normed[0].v[0];
#ifdef MATRIX2
  constexpr uint UNITS1 = uint(PAIRS1 / (R / 2));
  if (unit >= UNITS1) {
    start_unit<true, GROUP2, K, R, HALF, PAIRS - PAIRS1, SPLIT, DEPTH, RING>(FORMAT2(), vector, unit - UNITS1, own, lane, simd,
                                                                            MATRIX2);
  } else
#endif
  {
    start_unit<true, GROUP, K, R, HALF, PAIRS1, SPLIT, DEPTH, RING>(FORMAT(), vector, unit, own, lane, simd, MATRIX);
  }
  norm_row<T, K, THREADS>(FORMAT(), x, weight, vector, &sixteens[0], partial, float_of_bits(EPS), id, lane, simd);
  static_assert(RING == 0 || GROUPS * UNITS * (R / 2) >= PAIRS, "what is started before the norm is the only round");
  // As many rounds for each unit: unit_sums may have barriers.
  for (int round = 0; round * GROUPS * UNITS * (R / 2) < PAIRS; ++round) {
    const uint pair = unit * uint(R / 2) + lane;
    const bool mine = simd % uint(SPLIT) == 0u && lane < uint(R / 2) && pair < uint(PAIRS);
    const uint head = mine ? pair / uint(HALF) : 0u;
    const uint i = mine ? pair % uint(HALF) : 0u;
    uint at = head * uint(2 * HALF) + i;
    // Asked for before the products, which take as long.
    const float low_bias = float(bias[at]);
    const float high_bias = float(bias[at + uint(HALF)]);
    const Pack<2> turn = load_aligned<2, true>(table, 2u * i);
    UnitSums sums;
#ifdef MATRIX2
    if (unit >= UNITS1) {
      sums = unit_sums<T, true, BITS2, GROUP2, K, R, HALF, PAIRS - PAIRS1, SPLIT, DEPTH, RING>(
          FORMAT2(), vector, &sixteens[0], unit - UNITS1, own, partial, lane, simd, MATRIX2);
    } else
#endif
    {
      sums = unit_sums<T, true, BITS, GROUP, K, R, HALF, PAIRS1, SPLIT, DEPTH, RING>(
          FORMAT(), vector, &sixteens[0], unit, own, partial, lane, simd, MATRIX);
    }
    if (mine) {
      float a = float(T(float(T(sums.first)) + low_bias));
      float b = float(T(float(T(sums.second)) + high_bias));
      if (head < uint(HEADS + KV)) {
        const float first_half = rotated(a, b, turn.v[0], turn.v[1]);
        b = rotated(b, -a, turn.v[0], turn.v[1]);
        a = first_half;
      }
      if (head < uint(HEADS)) {
        q[at] = T(a);
        q[at + uint(HALF)] = T(b);
      } else if (slot < uint(TAIL)) {
        at = ((head - uint(HEADS)) * uint(TAIL) + slot) * uint(2 * HALF) + i;
        new_tail[at] = T(a);
        new_tail[at + uint(HALF)] = T(b);
      }
    }
    unit += uint(GROUPS * UNITS);
  }
}
