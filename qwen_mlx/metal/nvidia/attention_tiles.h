// Attention of GROUP query heads, at most 8, on the key/value head that they share, on tensor cores (tiles.h). Rows of the tiles
// are queries, and lane 4 g + t has those of query g. Of the 16 rows the scores need 8. The weights take all: their upper bits of T
// stand in row g, the rest in row g + 8, so that nothing is lost when T rounds them.
template <int D>
struct TileQueries {
  metal::uint4 v[D / 32];
};

// A simdgroup's running softmax. largest is query g's, total of the lane's own keys. A tile has 8 of 64 elements, `element` says
// which.
template <int D>
struct TileAttention {
  float largest, total;
  Pack<4> sums[D / 8];
};

// The element that the lane has at i (0 or 1) in the sums of tile `tile`.
FUNCTION uint element(uint tile, uint i, uint lane) {
  return tile / 8u * 64u + (lane % 4u * 2u + i) * 8u + tile % 8u;
}

template <typename T, int GROUP, int D, typename Q>
FUNCTION TileQueries<D> tile_queries(Q q, uint query, uint lane) {
  const uint g = lane / 4u < uint(GROUP) ? lane / 4u : uint(GROUP - 1);
  TileQueries<D> queries;
  UNROLL
  for (int c = 0; c < D / 32; ++c) {
    queries.v[c] = load_aligned_halves(q, (query + g) * uint(D) + uint(c * 32) + lane % 4u * 8u);
  }
  return queries;
}

template <int D>
FUNCTION TileAttention<D> no_attention() {
  TileAttention<D> a;
  a.largest = -INFINITY;
  a.total = 0.0f;
  UNROLL
  for (int tile = 0; tile < D / 8; ++tile) {
    a.sums[tile] = zeros<4>();
  }
  return a;
}

// Attends to KEYS rows from each of start, start + stride, ... on, below end; keys and values as in attend_rows.
template <typename T, int D, int KEYS, typename KV>
FUNCTION TileAttention<D> attend_tiles(TileAttention<D> a, TileQueries<D> queries, KV kv, uint keys, uint values, uint start,
                                       uint stride, uint end, uint lane, float scale) {
  const uint g = lane / 4u;
  const uint t = lane % 4u;
  for (; start < end; start += stride) {
    metal::uint4 key[KEYS / 8][D / 32];
    metal::uint4 value[KEYS / 4][D / 64];
    UNROLL
    for (int tile = 0; tile < KEYS / 8; ++tile) {
      const uint row = start + uint(tile * 8) + g;
      UNROLL
      for (int c = 0; c < D / 32; ++c) {  // beyond the last row the weight is 0
        key[tile][c] = load_aligned_halves(kv, (keys + (row < end ? row : end - 1u)) * uint(D) + uint(c * 32) + t * 8u);
      }
    }
    UNROLL
    for (int r = 0; r < KEYS / 4; ++r) {  // of each 8 rows the lane's two
      const uint row = start + uint(r / 2 * 8 + r % 2) + t * 2u;
      UNROLL
      for (int h = 0; h < D / 64; ++h) {
        value[r][h] = load_aligned_halves(kv, (values + (row < end ? row : end - 1u)) * uint(D) + uint(h * 64) + g * 8u);
      }
    }
    Pack<4> scores[KEYS / 8];
    float largest = a.largest;
    UNROLL
    for (int tile = 0; tile < KEYS / 8; ++tile) {
      Pack<4> dots = zeros<4>();
      UNROLL
      for (int c = 0; c < D / 32; ++c) {
        const metal::uint4 q = queries.v[c];
        const metal::uint4 k = key[tile][c];
        dots = tile_product(dots, metal::uint4(q.x, 0u, q.y, 0u), metal::uint2(k.x, k.y), lane, T());
        dots = tile_product(dots, metal::uint4(q.z, 0u, q.w, 0u), metal::uint2(k.z, k.w), lane, T());
      }
      UNROLL
      for (int i = 0; i < 2; ++i) {
        scores[tile].v[i] = start + uint(tile * 8 + i) + t * 2u < end ? dots.v[i] * scale : -INFINITY;
        largest = metal::max(largest, scores[tile].v[i]);
      }
    }
    largest = metal::max(largest, metal::simd_shuffle_xor(largest, ushort(1)));
    largest = metal::max(largest, metal::simd_shuffle_xor(largest, ushort(2)));
    const float shrunk = weight_of(a.largest, largest);
    a.largest = largest;
    a.total *= shrunk;
    UNROLL
    for (int tile = 0; tile < D / 8; ++tile) {
      UNROLL
      for (int i = 0; i < 4; ++i) {
        a.sums[tile].v[i] *= shrunk;
      }
    }
    UNROLL
    for (int pair = 0; pair < KEYS / 16; ++pair) {
      uint weights[4];  // of 8 keys, then of the next 8: upper bits, and the rest
      UNROLL
      for (int h = 0; h < 2; ++h) {
        Pack<2> exact;
        UNROLL
        for (int i = 0; i < 2; ++i) {
          exact.v[i] = weight_of(scores[pair * 2 + h].v[i], largest);
          a.total += exact.v[i];
        }
        const Pack<2> upper = rounded<T>(exact);
        weights[h * 2] = rounded_pair(upper.v[0], upper.v[1], T());
        weights[h * 2 + 1] = rounded_pair(exact.v[0] - upper.v[0], exact.v[1] - upper.v[1], T());
      }
      const metal::uint4 rows = metal::uint4(weights[0], weights[1], weights[2], weights[3]);
      UNROLL
      for (int tile = 0; tile < D / 8; ++tile) {
        uint four[4];
        UNROLL
        for (int r = 0; r < 4; ++r) {
          four[r] = value[pair * 4 + r][tile / 8][tile % 8 / 2];
        }
        const metal::uint2 columns = tile % 2 == 0
            ? metal::uint2(lower_halves(four[0], four[1]), lower_halves(four[2], four[3]))
            : metal::uint2(upper_halves(four[0], four[1]), upper_halves(four[2], four[3]));
        a.sums[tile] = tile_product(a.sums[tile], rows, columns, lane, T());
      }
    }
  }
  return a;
}
