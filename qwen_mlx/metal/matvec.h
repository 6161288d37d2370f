// out = T(weight * T(x / sqrt(mean(x^2) + eps))) for a whole threadgroup, at place_of; ends with a barrier.
template <typename T, int K, int THREADS, typename X, typename Weight, typename Out, typename Partial>
FUNCTION void norm_row(X x, Weight weight, Out out, Partial partial, float eps, uint id, uint lane, uint simd) {
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
    if (i < uint(K)) {
      Pack<N> normed;
      UNROLL
      for (int k = 0; k < N; ++k) {
        normed.v[k] = scaled_by<T>(values[p].v[k], scale, factors[p].v[k]);
      }
      store<T>(out, place_of<T, true>(i), normed);
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
}

// What a lane has under way: DEPTH chunks of a unit's rows.
template <typename Rows, typename Chunk, int DEPTH>
struct Ahead {
  Rows rows;
  Chunk found[DEPTH];
};

// Chunks first, first + STEP, ... of R rows, as far as there are any.
template <typename T, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename Format, typename... Arrays>
FUNCTION auto load_chunks(Format format, Rows<R> rows, uint first, Arrays... arrays) {
  Ahead<Rows<R>, decltype(load_chunk<T, BITS, GROUP, K, R, ALIGNED>(format, rows, first, arrays...)), DEPTH> ahead;
  ahead.rows = rows;
  UNROLL
  for (int d = 0; d < DEPTH; ++d) {
    const uint chunk = first + uint(d * STEP);
    if (chunk < uint(chunk_count<T, K>(Format()))) {
      ahead.found[d] = load_chunk<T, BITS, GROUP, K, R, ALIGNED>(format, rows, chunk, arrays...);
    }
  }
  return ahead;
}

// The first chunks of a unit, whose rows rows_of says, for unit_sums: asked for before the vector is normed, while the memory
// would be idle.
template <typename T, int BITS, int GROUP, int K, int R, int WIDTH, int COUNT, int SPLIT, int DEPTH, typename Format,
          typename W, typename... Rest>
FUNCTION auto load_ahead(Format format, uint unit, uint lane, uint simd, W w, Rest... rest) {
  constexpr int STEP = SIMD_WIDTH * SPLIT;
  const Rows<R> rows = rows_of<R, WIDTH, COUNT>(unit);
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  return is_aligned(w) ? load_chunks<T, BITS, GROUP, K, R, STEP, DEPTH, true>(format, rows, first, w, rest...)
                       : load_chunks<T, BITS, GROUP, K, R, STEP, DEPTH, false>(format, rows, first, w, rest...);
}

// One lane's part of the products of R rows with x: of chunks first, first + STEP, ..., DEPTH of them loaded at once.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int STEP, int DEPTH, bool ALIGNED, typename Format,
          typename First, typename X, typename... Arrays>
FUNCTION Pack<R> row_dots(Format format, First ahead, X x, uint first, Arrays... arrays) {
  constexpr int CHUNKS = chunk_count<T, K>(Format());
  Pack<R> sums;
  UNROLL
  for (int r = 0; r < R; ++r) {
    sums.v[r] = 0.0f;
  }
  for (int start = 0; start < CHUNKS; start += STEP * DEPTH) {
    if (start > 0) {
      ahead = load_chunks<T, BITS, GROUP, K, R, STEP, DEPTH, ALIGNED>(format, ahead.rows, first + uint(start), arrays...);
    }
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint chunk = first + uint(start + d * STEP);
      if (chunk < uint(CHUNKS)) {
        sums = add_chunk<T, STAGED, BITS, R, ALIGNED>(format, ahead.found[d], chunk, x, sums);
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

// The products of a unit's rows with x; `ahead` is load_ahead's of that unit. With SPLIT above 1 all threads of the
// threadgroup have to come here.
template <typename T, bool STAGED, int BITS, int GROUP, int K, int R, int SPLIT, int DEPTH, typename First, typename X,
          typename Partial, typename Format, typename W, typename... Rest>
FUNCTION UnitSums unit_sums(Format format, First ahead, X x, Partial partial, uint lane, uint simd, W w, Rest... rest) {
  const uint first = simd % uint(SPLIT) * uint(SIMD_WIDTH) + lane;
  constexpr int STEP = SIMD_WIDTH * SPLIT;
  Pack<R> sums = is_aligned(w) && is_aligned(x)
                     ? row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, true>(format, ahead, x, first, w, rest...)
                     : row_dots<T, STAGED, BITS, GROUP, K, R, STEP, DEPTH, false>(format, ahead, x, first, w, rest...);
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
