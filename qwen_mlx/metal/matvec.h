// Which of 8 elements lies at place k of a normed vector.
template <typename Format>
FUNCTION constexpr int staged_element(Format, int k) {
  return k;
}

// Whether a format needs the sums of each 16 elements of the normed vector (tile_sums.h).
template <typename Format>
FUNCTION constexpr bool needs_sums(Format) {
  return false;
}

// out = T(weight * T(x / sqrt(mean(x^2) + eps))) for a whole threadgroup, at place_of and in the format's order; sixteens: the
// sums of each 16 elements of out, if the format needs them. Ends with a barrier.
template <typename T, int K, int THREADS, typename Format, typename X, typename Weight, typename Out, typename Sums,
          typename Partial>
FUNCTION void norm_row(Format, X x, Weight weight, Out out, Sums sixteens, Partial partial, float eps, uint id, uint lane,
                       uint simd) {
  constexpr int N = 16 / sizeof(T);
  constexpr int PACKS = (K / N + THREADS - 1) / THREADS;
  Pack<N> values[PACKS];
  Pack<N> factors[PACKS];
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    if (i < uint(K)) {
      values[p] = load<N>(x, i);
      factors[p] = load<N>(weight, i);
    }
  }
  float sum = 0.0f;
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    if ((id + uint(p * THREADS)) * uint(N) < uint(K)) {
      float part = 0.0f;
      UNROLL
      for (int k = 0; k < N; ++k) {
        part = metal::fma(values[p].v[k], values[p].v[k], part);
      }
      sum += part;
    }
  }
  sum = metal::simd_sum(sum);
  if (lane == 0u) {
    partial[simd] = sum;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  sum = metal::simd_sum(lane < uint(THREADS / SIMD_WIDTH) ? partial[lane] : 0.0f);
  const Inverse scale = inverse_root_mean(sum, float(K), eps);
  UNROLL
  for (int p = 0; p < PACKS; ++p) {
    const uint i = (id + uint(p * THREADS)) * uint(N);
    Pack<N> normed;
    if (i < uint(K)) {
      UNROLL
      for (int k = 0; k < N; ++k) {
        const int from = staged_element(Format(), k) % N;
        normed.v[k] = scaled_by<T>(values[p].v[from], scale, factors[p].v[from]);
      }
      normed = rounded<T>(normed);
      store<T>(out, place_of<T, true>(i), normed);
    }
    if (needs_sums(Format())) {
      float both = 0.0f;
      if (i < uint(K)) {
        UNROLL
        for (int k = 0; k < N; ++k) {
          both += normed.v[k];
        }
      }
      both += metal::simd_shuffle_xor(both, ushort(1));
      if (i < uint(K) && lane % 2u == 0u) {
        sixteens[i / 16u] = both;
      }
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}

// One lane's part of the products of R rows with x: chunks first, first + STEP, ..., DEPTH of them loaded at once.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename Format,
          typename X, typename... Arrays>
FUNCTION Pack<R> row_dots(Format format, X x, Rows<R> rows, uint first, Arrays... arrays) {
  constexpr int CHUNKS = chunk_count<T, K>(Format());
  Pack<R> sums;
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = 0.0f;
  }
  for (int start = 0; start < CHUNKS; start += STEP * DEPTH) {
    decltype(load_chunk<T, BITS, GROUP, K, R, ALIGNED>(format, rows, first, arrays...)) found[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        found[d] = load_chunk<T, BITS, GROUP, K, R, ALIGNED>(format, rows, chunk, arrays...);
      }
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        sums = add_chunk<T, STAGED, BITS, R, ALIGNED>(format, found[d], chunk, x, sums);
      }
    }
  }
  return sums;
}

// Of a unit's R rows, what lane i of its simdgroups has: the product of row i with x, and of row i + R / 2.
struct UnitSums {
  float first, second;
};

// sums.v[r], r below R, where r is not a constant: as an index it would send the sums to memory, and without the addition
// the compiler makes it one.
template <int R>
FUNCTION float chosen(Pack<R> sums, uint r) {
  float sum = 0.0f;
  UNROLL
  for (int i = 0; i < R; ++i) {
    const float other = sums.v[i] + 0.0f;
    sum = r == uint(i) ? other : sum;
  }
  return sum;
}

// A unit belongs to SPLIT simdgroups, whose sums have met in `partial`.
template <int R, int SPLIT, typename Partial>
FUNCTION UnitSums met(Partial partial, uint lane, uint simd) {
  UnitSums sums;
  sums.first = 0.0f;
  sums.second = 0.0f;
  for (int s = 0; s < SPLIT; ++s) {
    const uint from = (simd / uint(SPLIT) * uint(SPLIT) + uint(s)) * uint(R) + lane % uint(R);
    sums.first += partial[from];
    sums.second += partial[from + (lane < uint(R / 2) ? uint(R / 2) : 0u)];
  }
  return sums;
}

// Starts to read a unit's rows, for formats that can (tile_sums.h); ring: RING words of threadgroup memory for each of DEPTH
// steps, of this simdgroup alone.
template <bool STAGED, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, int RING, typename X, typename Ring,
          typename Format, typename... Arrays>
FUNCTION void start_unit(Format, X, uint, Ring, uint, uint, Arrays...) {}

// The products of a unit's rows, which start_unit was called for, with x; rows_of says which. With SPLIT above 1 all threads of
// the threadgroup have to come here.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, int RING,
          typename X, typename Sums, typename Ring, typename Partial, typename Format, typename W, typename... Rest>
FUNCTION UnitSums unit_sums(Format format, X x, Sums, uint unit, Ring, Partial partial, uint lane, uint simd, W w,
                            Rest... rest) {
  const Rows<R> rows = rows_of<R, WIDTH, COUNT>(unit);
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  constexpr int STEP = SIMD_WIDTH * SPLIT;
  Pack<R> sums = is_aligned(w) && is_aligned(x)
                     ? row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, true>(format, x, rows, first, w, rest...)
                     : row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, false>(format, x, rows, first, w, rest...);
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = metal::simd_sum(sums.v[r]);
  }
  UnitSums found;
  found.first = chosen<R>(sums, lane);
  found.second = chosen<R>(sums, lane + uint(R / 2));
  if (SPLIT > 1) {
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    if (lane < uint(R)) {
      partial[simd * uint(R) + lane] = found.first;
    }
    metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
    found = met<R, SPLIT>(partial, lane, simd);
  }
  return found;
}
