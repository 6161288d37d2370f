// q | k | v = T(T(W norm(x)) + bias) for one vector x (K), q and k turned. FORMAT, MATRIX: W ((HEADS + 2 KV) 2 HALF, K), see its
// format's header, of which a second matrix may hold what follows the first PAIRS1 pairs; weight (K) and EPS, the bits of eps, of the norm; table (HALF, 4) of rotation.metal; place (2) int32: the position,
// and how many tokens lie before the tail. q (HEADS, 2 HALF), T. new_tail (2 KV, TAIL, 2 HALF), T: tail, k and v put at
// place[0] - place[1]. A unit is R / 2 pairs of elements HALF apart.
// Template: T, K, HEADS, KV, HALF, TAIL, R, SPLIT, DEPTH, THREADS, GROUPS threadgroups, EPS, BITS, GROUP, PAIRS1;
// where there is a second matrix BITS2, GROUP2, and SPLIT is 1: a threadgroup's units may belong to both.
constexpr int PAIRS = (HEADS + 2 * KV) * HALF;
constexpr int UNITS = THREADS / SIMD_WIDTH / SPLIT;
threadgroup float partial[THREADS / SIMD_WIDTH * R];
threadgroup Staged<T> normed[(K * sizeof(T) + 127) / 128 * 9];

const uint id = thread_position_in_threadgroup.x;
const uint lane = thread_index_in_simdgroup;
const uint simd = simdgroup_index_in_threadgroup;
uint unit = threadgroup_position_in_grid.x * uint(UNITS) + simd / uint(SPLIT);
fetch_ahead<R, row_length<T, BITS, K>(FORMAT())>(rows_of<R, HALF, PAIRS1>(unit), lane, w);
norm_row<T, K, THREADS>(x, weight, &normed[0].v[0], partial, float_of_bits(EPS), id, lane, simd);
const uint slot = uint(place[0] - place[1]);
for (uint i = threadgroup_position_in_grid.x * uint(THREADS) + id; i < uint(4 * KV * TAIL * HALF); i += uint(GROUPS * THREADS)) {
  if (i / uint(2 * HALF) % uint(TAIL) != slot) {
    new_tail[i] = tail[i];
  }
}
// As many rounds for each unit: row_sums may have barriers.
for (int round = 0; round * GROUPS * UNITS * (R / 2) < PAIRS; ++round) {
  Pack<R> sums;
#ifdef MATRIX2
  constexpr uint UNITS1 = uint(PAIRS1 / (R / 2));
  if (unit >= UNITS1) {
    sums = row_sums<T, true, BITS2, GROUP2, K, R, SPLIT, DEPTH>(
        FORMAT2(), &normed[0].v[0], rows_of<R, HALF, PAIRS - PAIRS1>(unit - UNITS1), partial, lane, simd, MATRIX2);
  } else
#endif
  {
    sums = row_sums<T, true, BITS, GROUP, K, R, SPLIT, DEPTH>(
        FORMAT(), &normed[0].v[0], rows_of<R, HALF, PAIRS1>(unit), partial, lane, simd, MATRIX);
  }
  const uint pair = unit * uint(R / 2) + lane;
  if (simd % uint(SPLIT) == 0u && lane < uint(R / 2) && pair < uint(PAIRS)) {
    const uint head = pair / uint(HALF);
    const uint i = pair % uint(HALF);
    uint at = head * uint(2 * HALF) + i;
    float a = float(T(float(T(chosen<R>(sums, lane))) + float(bias[at])));
    float b = float(T(float(T(chosen<R>(sums, lane + uint(R / 2)))) + float(bias[at + uint(HALF)])));
    if (head < uint(HEADS + KV)) {
      const uint t = 4u * i;
      const float turned = difference(a, table[t], table[t + 1u], b, table[t + 2u], table[t + 3u]);
      b = difference(b, table[t], table[t + 1u], -a, table[t + 2u], table[t + 3u]);
      a = turned;
    }
    if (head < uint(HEADS)) {
      q[at] = T(a);
      q[at + uint(HALF)] = T(b);
    } else {
      at = ((head - uint(HEADS)) * uint(TAIL) + slot) * uint(2 * HALF) + i;
      new_tail[at] = T(a);
      new_tail[at + uint(HALF)] = T(b);
    }
  }
  unit += uint(GROUPS * UNITS);
}
