// Attention of one token's GROUP query heads on one key/value head. LANES lanes of a simdgroup hold a row, 16 bytes each, so
// that a simdgroup reads KEYS neighbouring rows at once; each LANES lanes keep a running softmax of their own (Milakov and
// Gimelshein 2018, algorithm 3), and all meet at the end.
template <int GROUP, int N>
struct Attended {
  float largest[GROUP];  // of the scores so far
  float total[GROUP];    // of the weights
  Pack<N> sum[GROUP];    // of weighted values
};

// Once merged, for one query head: `sum` is of this thread's element.
struct Merged {
  float largest, total, sum;
};

template <int GROUP, int N>
struct Queries {
  Pack<N> v[GROUP];
};

// While all scores are -inf their weights are 0: -inf minus -inf would be NaN.
FUNCTION float weight_of(float score, float largest) {
  return largest == float_of_bits(int(0xff800000u)) ? 0.0f : metal::precise::exp(score - largest);
}

// Rows start, start + stride, ... below end, whose keys begin at row `keys` and their values at row `values` of `kv`;
// `lane_row` and `part`: which of a simdgroup's rows, and which of a row's 16 bytes, are this lane's.
template <typename T, int GROUP, int D, int DEPTH, typename KV>
FUNCTION Attended<GROUP, 16 / sizeof(T)> attend_rows(Attended<GROUP, 16 / sizeof(T)> a,
                                                     Queries<GROUP, 16 / sizeof(T)> queries, KV kv, uint keys,
                                                     uint values, uint start, uint stride, uint end, uint lane_row,
                                                     uint part, float scale) {
  constexpr int N = 16 / sizeof(T);
  constexpr int LANES = D / N;
  for (; start < end; start += stride * uint(DEPTH)) {
    Pack<N> key[DEPTH];
    Pack<N> value[DEPTH];
    UNROLL
    for (int d = 0; d < DEPTH; ++d) {
      const uint row = start + uint(d) * stride + lane_row;
      const uint seen = row < end ? row : end - 1u;  // beyond the last row the weight is 0
      key[d] = load_aligned<N, true>(kv, (keys + seen) * uint(D) + part * uint(N));
      value[d] = load_aligned<N, true>(kv, (values + seen) * uint(D) + part * uint(N));
    }
    UNROLL
    for (int g = 0; g < GROUP; ++g) {
      float score[DEPTH];
      float most = a.largest[g];
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        float dot = 0.0f;
        UNROLL
        for (int k = 0; k < N; ++k) {
          dot = metal::fma(queries.v[g].v[k], key[d].v[k], dot);
        }
        UNROLL
        for (int step = LANES / 2; step > 0; step /= 2) {
          dot += metal::simd_shuffle_xor(dot, ushort(step));
        }
        score[d] = start + uint(d) * stride + lane_row < end ? dot * scale : float_of_bits(int(0xff800000u));
        most = metal::max(most, score[d]);
      }
      const float shrunk = weight_of(a.largest[g], most);
      a.largest[g] = most;
      a.total[g] *= shrunk;
      UNROLL
      for (int k = 0; k < N; ++k) {
        a.sum[g].v[k] *= shrunk;
      }
      UNROLL
      for (int d = 0; d < DEPTH; ++d) {
        const float weight = weight_of(score[d], most);
        a.total[g] += weight;
        UNROLL
        for (int k = 0; k < N; ++k) {
          a.sum[g].v[k] = metal::fma(weight, value[d].v[k], a.sum[g].v[k]);
        }
      }
    }
  }
  return a;
}

// What worker `worker` of `workers` simdgroups attends to: its share of the rows before the tail, then of the tail.
// head: of the keys, among all of kv; room, tail_room: rows a head has in kv and in tail; position: the token's; filled: how
// many tokens lie before the tail; least: the first row that counts.
template <typename T, int HEADS, int GROUP, int D, int WINDOW, int DEPTH, typename Q, typename KV>
FUNCTION Attended<GROUP, 16 / sizeof(T)> attend_all(Q q, uint first, KV kv, uint room, KV tail, uint tail_room,
                                                    uint position, uint filled, uint least, uint head, uint worker,
                                                    uint workers, uint lane, float scale) {
  constexpr int N = 16 / sizeof(T);
  constexpr int LANES = D / N;
  constexpr uint KEYS = uint(SIMD_WIDTH / LANES);
  const uint part = lane % uint(LANES);
  Queries<GROUP, N> queries;
  Attended<GROUP, N> a;
  UNROLL
  for (int g = 0; g < GROUP; ++g) {
    queries.v[g] = load<N>(q, (first + uint(g)) * uint(D) + part * uint(N));
    a.largest[g] = float_of_bits(int(0xff800000u));
    a.total[g] = 0.0f;
    UNROLL
    for (int k = 0; k < N; ++k) {
      a.sum[g].v[k] = 0.0f;
    }
  }
  const uint end = position + 1u;
  const uint begin = metal::max(least, WINDOW > 0 && end > uint(WINDOW) ? end - uint(WINDOW) : 0u);
  const uint stride = workers * KEYS;
  a = attend_rows<T, GROUP, D, DEPTH>(a, queries, kv, head * room, (uint(HEADS) + head) * room, begin + worker * KEYS,
                                      stride, filled, lane / uint(LANES), part, scale);
  // The tail from the last worker on: the first one has the most to do already.
  const uint skipped = begin > filled ? begin - filled : 0u;
  return attend_rows<T, GROUP, D, 1>(a, queries, tail, head * tail_room, (uint(HEADS) + head) * tail_room,
                                     skipped + (workers - 1u - worker) * KEYS, stride, end - filled, lane / uint(LANES),
                                     part, scale);
}

// Query head g of all simdgroups of a threadgroup, for thread `id` < D; `parts` has room for SIMDS D, `largest` and
// `totals` for SIMDS. Begins and ends with a barrier.
template <int GROUP, int N, int D, int SIMDS, typename Floats>
FUNCTION Merged merged(Attended<GROUP, N> a, int g, Floats parts, Floats largest, Floats totals, uint id, uint lane,
                       uint simd) {
  constexpr uint LANES = uint(D / N);
  float most = a.largest[g];
  UNROLL
  for (uint step = LANES; step < uint(SIMD_WIDTH); step *= 2u) {
    most = metal::max(most, metal::simd_shuffle_xor(most, ushort(step)));
  }
  const float factor = weight_of(a.largest[g], most);
  float total = a.total[g] * factor;
  Pack<N> sum = a.sum[g];
  UNROLL
  for (int k = 0; k < N; ++k) {
    sum.v[k] *= factor;
  }
  UNROLL
  for (uint step = LANES; step < uint(SIMD_WIDTH); step *= 2u) {
    total += metal::simd_shuffle_xor(total, ushort(step));
    UNROLL
    for (int k = 0; k < N; ++k) {
      sum.v[k] += metal::simd_shuffle_xor(sum.v[k], ushort(step));
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (lane < LANES) {
    store<float>(parts, simd * uint(D) + lane * uint(N), sum);
  }
  if (lane == 0u) {
    largest[simd] = most;
    totals[simd] = total;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  const uint other = lane < uint(SIMDS) ? lane : 0u;
  Merged all;
  all.largest = metal::simd_max(largest[other]);
  const float share = weight_of(largest[other], all.largest);
  all.total = metal::simd_sum(lane < uint(SIMDS) ? share * totals[other] : 0.0f);
  all.sum = 0.0f;
  for (int s = 0; s < SIMDS; ++s) {
    const float weight = metal::simd_shuffle(share, ushort(s));
    all.sum = metal::fma(weight, parts[uint(s) * uint(D) + (id < uint(D) ? id : 0u)], all.sum);
  }
  return all;
}
