// matvec.h's unit_sums for Tiles of a format.

// rows: g's and g + 8's; blocks first, first + SPLIT, ...
template <typename T, bool STAGED, int BITS, int GROUP, int K, int SPLIT, int DEPTH, bool ALIGNED, typename Format, typename X,
          typename... Arrays>
FUNCTION Pack<2> tile_dots(Format format, X x, Rows<2> rows, uint first, uint lane, Arrays... arrays) {
  constexpr int BLOCKS = tile_count<K, GROUP>(Format());
  Pack<2> sums;
  sums.v[0] = 0.0f;
  sums.v[1] = 0.0f;
  for (int start = 0; start < BLOCKS; start += SPLIT * DEPTH) {
    decltype(load_tile<GROUP, K, ALIGNED>(format, rows, first, lane, arrays...)) found[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint block = first + uint(start + d * SPLIT);
      if (block < uint(BLOCKS)) {
        found[d] = load_tile<GROUP, K, ALIGNED>(format, rows, block, lane, arrays...);
      }
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint block = first + uint(start + d * SPLIT);
      if (block < uint(BLOCKS)) {
        sums = add_tile<T, STAGED, GROUP, K, ALIGNED>(format, found[d], block, x, lane, sums);
      }
    }
  }
  return sums;
}

// For units of 16 rows.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, typename X,
          typename Partial, typename Format, typename W, typename... Rest>
FUNCTION UnitSums unit_sums(Tiles<Format>, X x, uint unit, Partial partial, uint lane, uint simd, W w, Rest... rest) {
  Rows<2> rows;
  rows.v[0] = row_of<R, WIDTH, COUNT>(unit, lane / 4u);
  rows.v[1] = row_of<R, WIDTH, COUNT>(unit, lane / 4u + 8u);
  const uint first = simd % uint(SPLIT);
  Pack<2> sums =
      is_aligned(w) && is_aligned(x)
          ? tile_dots<T, STAGED, BITS, GROUP, K, SPLIT, DEPTH, true>(Format(), x, rows, first, lane, w, rest...)
          : tile_dots<T, STAGED, BITS, GROUP, K, SPLIT, DEPTH, false>(Format(), x, rows, first, lane, w, rest...);
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
