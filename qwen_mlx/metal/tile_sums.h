// matvec.h's unit_sums for Tiles of a format. A simdgroup's rows come through a ring of DEPTH stages, RING words each, in
// threadgroup memory: the next stages are under way while one is multiplied, without a register for them, and the first ones
// before the vector is normed. A stage is 256 elements of 16 rows: 128 bytes of codes in a row are read together, of 64 the
// memory gives a fifth less.

FUNCTION bool all_aligned() {
  return true;
}
template <typename Array, typename... Rest>
FUNCTION bool all_aligned(Array array, Rest... rest) {
  return is_aligned(array) && all_aligned(rest...);
}

// Row r of a stage's 16.
template <int R, int WIDTH, int COUNT>
struct StageRows {
  uint unit;
  FUNCTION uint row(uint r) const {
    return row_of<R, WIDTH, COUNT>(unit, r);
  }
};

// Starts to copy stage n of a simdgroup, which has stages first, first + SPLIT, ... of its rows; an empty batch after the last.
// TOTAL: the matrix's rows.
template <bool STAGED, int GROUP, int K, int TOTAL, int SPLIT, int DEPTH, int RING, bool ALIGNED, typename Format, typename X,
          typename Lines, typename Ring, typename... Arrays>
FUNCTION void start_stage(Format format, X x, Lines rows, uint first, uint n, Ring ring, uint lane, Arrays... arrays) {
  const uint stage = first + n * uint(SPLIT);
  const uint at = n % uint(DEPTH) * uint(RING);
  if (stage < uint((K + 255) / 256)) {
    start_codes<GROUP, K, TOTAL, ALIGNED>(format, rows, stage, ring, at, lane, arrays...);
    const uint from = stage * 256u + lane * 8u;
    if (!STAGED && from < uint(K)) {
      start_copy<8, ALIGNED>(ring, at + uint(RING - VECTOR_WORDS) + lane * 4u, x, from);
    }
  }
  end_batch();
}

template <bool STAGED, int GROUP, int K, int TOTAL, int SPLIT, int DEPTH, int RING, bool ALIGNED, typename Format, typename X,
          typename Lines, typename Ring, typename... Arrays>
FUNCTION void start_stages(Format format, X x, Lines rows, uint first, Ring ring, uint lane, Arrays... arrays) {
  UNROLL
  for (int n = 0; n < DEPTH - 1; ++n) {
    start_stage<STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, ALIGNED>(format, x, rows, first, uint(n), ring, lane, arrays...);
  }
}

// The products of a simdgroup's stages, of which start_stages has started the first.
template <typename T, bool STAGED, int GROUP, int K, int TOTAL, int SPLIT, int DEPTH, int RING, bool ALIGNED, typename Format,
          typename X, typename Sums, typename Lines, typename Ring, typename... Arrays>
FUNCTION Pack<2> stage_dots(Format format, X x, Sums sixteens, Lines rows, uint first, Ring ring, uint lane, Arrays... arrays) {
  Pack<2> sums;
  sums.v[0] = 0.0f;
  sums.v[1] = 0.0f;
  uint n = 0u;
  for (uint stage = first; stage < uint((K + 255) / 256); stage += uint(SPLIT)) {
    wait_for_batches<DEPTH - 2>();
    metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
    start_stage<STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, ALIGNED>(format, x, rows, first, n + uint(DEPTH - 1), ring, lane,
                                                                     arrays...);
    const uint at = n % uint(DEPTH) * uint(RING);
    const uint vector_at = at + uint(RING - VECTOR_WORDS);
    sums = add_stage<T, STAGED, GROUP, K>(format, rows, stage, x, sixteens, ring, at, vector_at, lane, sums, arrays...);
    ++n;
  }
  return sums;
}

// For units of 16 rows: matvec.h's start_unit and unit_sums.
template <typename Format>
FUNCTION constexpr bool needs_sums(Tiles<Format>) {
  return true;
}

template <bool STAGED, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, int RING, typename X, typename Ring,
          typename Format, typename... Arrays>
FUNCTION void start_unit(Tiles<Format>, X x, uint unit, Ring ring, uint lane, uint simd, Arrays... arrays) {
  StageRows<R, WIDTH, COUNT> rows;
  rows.unit = unit;
  constexpr int TOTAL = WIDTH == 0 ? COUNT : 2 * COUNT;
  const uint first = simd % uint(SPLIT);
  if (all_aligned(x, arrays...)) {
    start_stages<STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, true>(Format(), x, rows, first, ring, lane, arrays...);
  } else {
    start_stages<STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, false>(Format(), x, rows, first, ring, lane, arrays...);
  }
}

template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, int RING,
          typename X, typename Sums, typename Ring, typename Partial, typename Format, typename W, typename... Rest>
FUNCTION UnitSums unit_sums(Tiles<Format>, X x, Sums sixteens, uint unit, Ring ring, Partial partial, uint lane, uint simd, W w,
                            Rest... rest) {
  StageRows<R, WIDTH, COUNT> rows;
  rows.unit = unit;
  constexpr int TOTAL = WIDTH == 0 ? COUNT : 2 * COUNT;
  const uint first = simd % uint(SPLIT);
  Pack<2> sums = all_aligned(x, w, rest...)
                     ? stage_dots<T, STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, true>(
                           Format(), x, sixteens, rows, first, ring, lane, w, rest...)
                     : stage_dots<T, STAGED, GROUP, K, TOTAL, SPLIT, DEPTH, RING, false>(
                           Format(), x, sixteens, rows, first, ring, lane, w, rest...);
  UNROLL
  for (int r = 0; r < 2; ++r) {
    sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(1));
    sums.v[r] += metal::simd_shuffle_xor(sums.v[r], ushort(2));
  }
  if (SPLIT > 1) {
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (lane % 4u < 2u) {
      partial[simd * uint(R) + lane / 4u + lane % 4u * 8u] = lane % 4u == 0u ? sums.v[0] : sums.v[1];
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    return met<R, SPLIT>(partial, lane, simd);
  }
  const float low = metal::simd_shuffle(sums.v[0], ushort(lane % 8u * 4u));
  UnitSums found;
  found.second = metal::simd_shuffle(sums.v[1], ushort(lane % 8u * 4u));
  found.first = lane < 8u ? low : found.second;
  return found;
}
